// SPDX-License-Identifier: Apache-2.0
// Working memory of a call, one block of which outlives it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

namespace pfa::cpu {

// Working memory up to this size stays with the process for the next call: fresh pages cost a fault
// every 4 KiB, a fifth of a bf16 call at seqlen 512 (head_dim 128, one thread, EPYC 9004 in a VM).
constexpr int64_t kKeptBytes = int64_t{40} << 20;

// 64-byte aligned memory; at most one block is kept between calls, whoever made it.
class Memory {
 public:
  explicit Memory(int64_t bytes) : block_(kept().exchange(nullptr)) {
    if (block_ != nullptr && block_->bytes >= bytes) return;
    delete block_;
    block_ = new Block(bytes);
  }
  ~Memory() {
    if (block_->bytes <= kKeptBytes) block_ = kept().exchange(block_);
    delete block_;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  [[nodiscard]] std::byte* data() const { return block_->data; }

 private:
  struct Block {
    explicit Block(int64_t size)
        : bytes(size),
          data(static_cast<std::byte*>(
              ::operator new(static_cast<size_t>(size), std::align_val_t{64}))) {}
    ~Block() { ::operator delete(data, std::align_val_t{64}); }
    int64_t bytes;
    std::byte* data;
  };
  static std::atomic<Block*>& kept() {
    static std::atomic<Block*> block{nullptr};
    return block;
  }
  Block* block_;
};

}  // namespace pfa::cpu
