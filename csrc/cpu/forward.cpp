// SPDX-License-Identifier: Apache-2.0
// Cuts a call into waves of kv heads that fit the workspace; packs each wave's keys and values,
// then runs its query blocks, both on the caller's threads.
#include "forward.h"

#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "plan.h"

namespace pfa::cpu {
namespace {

// Packed keys and values of one wave, unless a single head needs more.
constexpr int64_t kWorkspaceBytes = int64_t{24} << 20;
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

// Runs body(task, worker) for every task, each worker taking the next task when it is free.
template <class Body>
void run_dynamic(const Executor& executor, int64_t tasks, const Body& body) {
  struct Context {
    const Body& body;
    std::atomic<int64_t> next;
    int64_t tasks;
  } context{body, {0}, tasks};
  const int64_t workers = std::min<int64_t>(executor.num_threads, tasks);
  executor.run(
      workers,
      [](int64_t begin, int64_t end, void* opaque) {
        auto& shared = *static_cast<Context*>(opaque);
        for (int64_t worker = begin; worker < end; ++worker) {
          for (int64_t task; (task = shared.next.fetch_add(1)) < shared.tasks;) {
            shared.body(task, worker);
          }
        }
      },
      &context);
}

// What a dense mask leaves of each strip_rows x kPanel piece.
class VisibilityMap {
 public:
  VisibilityMap(const Problem& problem, int strip_rows, const Executor& executor)
      : problem_(problem),
        strip_rows_(strip_rows),
        masks_(problem.mask.batch == 0 ? 1 : problem.batch),
        strips_(ceil_div(problem.seqlen_q, strip_rows)),
        panels_(ceil_div(problem.seqlen_k, kPanel)),
        map_(static_cast<size_t>(masks_ * strips_ * panels_), Visibility::kNone) {
    run_dynamic(executor, masks_ * strips_,
                [this](int64_t task, int64_t) { classify(task / strips_, task % strips_); });
  }

  void attach(Plan& plan) const {
    plan.visibility = map_.data();
    plan.visibility_batch = masks_ == 1 ? 0 : strips_ * panels_;
    plan.visibility_row = panels_;
  }

 private:
  // A mask that several batch elements share is classified over its whole extent: what lies past a
  // shorter element's lengths exists, and calling a piece kSome is always right.
  void classify(int64_t b, int64_t strip) {
    const bool shared = masks_ == 1;
    const int64_t rows = shared ? problem_.seqlen_q : problem_.rows_used(b);
    const int64_t keys = shared ? problem_.seqlen_k : problem_.keys_used(b);
    const int64_t begin = strip * strip_rows_, end = std::min(rows, begin + strip_rows_);
    Visibility* out = map_.data() + (b * strips_ + strip) * panels_;
    for (int64_t panel = 0; panel * kPanel < keys; ++panel) {
      const int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, keys - first);
      bool any_kept = false, any_masked = false;
      for (int64_t row = begin; row < end && !(any_kept && any_masked); ++row) {
        const uint8_t* mask =
            problem_.mask.data + b * problem_.mask.batch + row * problem_.mask.row + first;
        int64_t masked = 0;
        for (int64_t j = 0; j < count; ++j) masked += mask[j] != 0;
        any_masked |= masked > 0;
        any_kept |= masked < count;
      }
      if (any_kept) out[panel] = any_masked ? Visibility::kSome : Visibility::kAll;
    }
  }

  const Problem& problem_;
  int64_t strip_rows_, masks_, strips_, panels_;
  std::vector<Visibility> map_;
};

// Key tiles of one batch element that any of its rows sees.
struct TileRange {
  int64_t begin = 0, end = 0;
  [[nodiscard]] int64_t size() const { return end - begin; }
};

TileRange tiles_of(const Plan& plan, int64_t b) {
  const int64_t rows = plan.problem->rows_used(b);
  if (rows == 0) return {};
  const Plan::Range keys = plan.keys_of_rows(b, 0, rows);
  if (keys.begin >= keys.end) return {};
  return {keys.begin / plan.block_n, ceil_div(keys.end, plan.block_n)};
}

// Consecutive (batch, kv head) pairs whose packed tiles fit the workspace together.
struct Wave {
  struct Entry {
    int64_t b, head_k;
    TileRange tiles;
    int64_t offset;  // of its first tile in the workspace, in tiles
  };
  std::vector<Entry> entries;
  int64_t tiles = 0;
};

class Forward {
 public:
  Forward(const Problem& problem, const Kernel& kernel, const Executor& executor)
      : problem_(problem), kernel_(kernel), executor_(executor) {
    plan_.problem = &problem;
    plan_.block_n = problem.head_dim <= 256 ? kMaxBlockN : kMaxBlockN / 2;
    plan_.d_panels = static_cast<int>(ceil_div(problem.head_dim, kPanel));
    kernel.configure(plan_);
  }

  void run() {
    std::unique_ptr<VisibilityMap> visibility;
    if (problem_.mask.data != nullptr) {
      visibility = std::make_unique<VisibilityMap>(problem_, kernel_.strip_rows, executor_);
      visibility->attach(plan_);
    }
    const std::vector<Wave> waves = plan_waves();
    int64_t most_tiles = 0;
    for (const Wave& wave : waves) most_tiles = std::max(most_tiles, wave.tiles);
    const int64_t tiles_bytes = most_tiles * plan_.tile_bytes;
    const Memory memory(tiles_bytes + executor_.num_threads * plan_.scratch_bytes);
    for (const Wave& wave : waves) run_wave(wave, memory.data(), memory.data() + tiles_bytes);
  }

 private:
  [[nodiscard]] std::vector<Wave> plan_waves() const {
    std::vector<Wave> waves(1);
    for (int64_t b = 0; b < problem_.batch; ++b) {
      const TileRange tiles = tiles_of(plan_, b);
      for (int64_t head_k = 0; head_k < problem_.num_heads_k; ++head_k) {
        const Wave& last = waves.back();
        const int64_t bytes = (last.tiles + tiles.size()) * plan_.tile_bytes;
        if (!last.entries.empty() && bytes > kWorkspaceBytes) waves.emplace_back();
        Wave& wave = waves.back();
        wave.entries.push_back({b, head_k, tiles, wave.tiles});
        wave.tiles += tiles.size();
      }
    }
    return waves;
  }

  void run_wave(const Wave& wave, std::byte* workspace, std::byte* scratch) const {
    std::vector<int64_t> owner(static_cast<size_t>(wave.tiles));
    for (size_t e = 0; e < wave.entries.size(); ++e) {
      const Wave::Entry& entry = wave.entries[e];
      std::fill_n(owner.begin() + entry.offset, entry.tiles.size(), static_cast<int64_t>(e));
    }
    run_dynamic(executor_, wave.tiles, [&](int64_t task, int64_t) {
      const Wave::Entry& entry =
          wave.entries[static_cast<size_t>(owner[static_cast<size_t>(task)])];
      kernel_.pack(plan_, entry.b, entry.head_k, entry.tiles.begin + task - entry.offset,
                   workspace + task * plan_.tile_bytes);
    });
    const int64_t blocks = ceil_div(problem_.seqlen_q, kBlockM);
    const int64_t group = problem_.heads_per_group();
    const auto entries = static_cast<int64_t>(wave.entries.size());
    run_dynamic(executor_, entries * group * blocks, [&](int64_t task, int64_t worker) {
      const Wave::Entry& entry = wave.entries[static_cast<size_t>(task / (group * blocks))];
      const int64_t in_group = task / blocks % group;
      const int64_t block = blocks - 1 - task % blocks;  // of causal bands the longest first
      kernel_.attend(plan_, entry.b, entry.head_k * group + in_group, block,
                     workspace + entry.offset * plan_.tile_bytes, entry.tiles.begin,
                     scratch + worker * plan_.scratch_bytes);
    });
  }

  const Problem& problem_;
  const Kernel& kernel_;
  const Executor& executor_;
  Plan plan_;
};

}  // namespace

void forward(const Problem& problem, const Executor& executor) {
  Forward(problem, *select_isa().kernel(problem.dtype), executor).run();
}

}  // namespace pfa::cpu
