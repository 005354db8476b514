// SPDX-License-Identifier: Apache-2.0
// Runs a call on the caller's threads: kv head by kv head where there are many short ones, else in
// waves of kv heads that fit the workspace, whose keys and values are packed before any query block
// runs.
#include "forward.h"

#include <atomic>
#include <optional>
#include <thread>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "plan.h"
#include "visibility.h"

namespace pfa::cpu {
namespace {

// Packed keys and values of one wave, unless a single head needs more.
constexpr int64_t kWorkspaceBytes = int64_t{24} << 20;
// A kv head whose packed tiles stay in a core's cache is packed and attended by one thread, if each
// thread has at least so many: 16 x 12 heads of 64 keys took 0.8 of the time (AVX2, one thread).
constexpr int64_t kCachedBytes = int64_t{256} << 10;
constexpr int64_t kHeadsPerThread = 4;
// A thread is worth waking for this much work, in nanoseconds; below, the caller works alone.
constexpr double kWorthAThread = 20e3;

// Runs body(task, worker) for every task, each worker taking the next task when it is free.
// nanoseconds: a rough estimate of all the work.
template <class Body>
void run_dynamic(const Executor& executor, int64_t tasks, double nanoseconds, const Body& body) {
  struct Context {
    const Body& body;
    std::atomic<int64_t> next;
    int64_t tasks;
  } context{body, {0}, tasks};
  const auto work = [](int64_t begin, int64_t end, void* opaque) {
    auto& shared = *static_cast<Context*>(opaque);
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = shared.next.fetch_add(1)) < shared.tasks;) {
        shared.body(task, worker);
      }
    }
  };
  const auto useful = static_cast<int64_t>(std::min(nanoseconds / kWorthAThread, 1e6));
  const int64_t workers = std::min({int64_t{executor.num_threads}, tasks, useful});
  if (workers > 1) {
    executor.run(workers, work, &context);
  } else {
    work(0, 1, &context);
  }
}

int block_n_of(const Problem& problem) {
  const int64_t most = problem.head_dim <= 256 ? kMaxBlockN : kMaxBlockN / 2;
  return static_cast<int>(std::clamp(round_up(problem.seqlen_k, kPanel), int64_t{kPanel}, most));
}

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
    plan_.block_n = block_n_of(problem);
    plan_.d_panels = static_cast<int>(ceil_div(problem.head_dim, kPanel));
    kernel.configure(plan_);
  }

  void run() {
    if (problem_.mask.data != nullptr) {
      visibility_.emplace(problem_, kernel_.strip_rows);
      visibility_->attach(plan_);
    }
    if (by_head()) {
      run_by_head();
      return;
    }
    const std::vector<Wave> waves = plan_waves(kWorkspaceBytes);
    int64_t most_tiles = 0;
    for (const Wave& wave : waves) most_tiles = std::max(most_tiles, wave.tiles);
    const int64_t tiles_bytes = most_tiles * plan_.tile_bytes;
    const Memory memory(tiles_bytes + executor_.num_threads * plan_.scratch_bytes);
    for (const Wave& wave : waves) {
      run_wave(wave, &wave == waves.data(), memory.data(), memory.data() + tiles_bytes);
    }
  }

 private:
  [[nodiscard]] bool by_head() const {
    const int64_t tiles = ceil_div(problem_.seqlen_k, plan_.block_n);
    return tiles * plan_.tile_bytes <= kCachedBytes &&
           problem_.batch * problem_.num_heads_k >= kHeadsPerThread * executor_.num_threads;
  }

  [[nodiscard]] std::vector<Wave> plan_waves(int64_t most_bytes) const {
    std::vector<Wave> waves(1);
    for (int64_t b = 0; b < problem_.batch; ++b) {
      const TileRange tiles = tiles_of(plan_, b);
      for (int64_t head_k = 0; head_k < problem_.num_heads_k; ++head_k) {
        const Wave& last = waves.back();
        const int64_t bytes = (last.tiles + tiles.size()) * plan_.tile_bytes;
        if (!last.entries.empty() && bytes > most_bytes) waves.emplace_back();
        Wave& wave = waves.back();
        wave.entries.push_back({b, head_k, tiles, wave.tiles});
        wave.tiles += tiles.size();
      }
    }
    return waves;
  }

  // Tasks that read the mask, then one for each kv head, which packs it into its worker's memory
  // and attends all query blocks to it.
  void run_by_head() {
    const Wave wave = plan_waves(INT64_MAX)[0];
    const int64_t mask_tasks = visibility_ ? visibility_->tasks() : 0;
    const int64_t tiles_bytes = ceil_div(problem_.seqlen_k, plan_.block_n) * plan_.tile_bytes;
    const int64_t worker_bytes = tiles_bytes + plan_.scratch_bytes;
    const Memory memory(executor_.num_threads * worker_bytes);
    std::atomic<int64_t> prepared{0};
    const auto work = [&](int64_t task, int64_t worker) {
      if (task < mask_tasks) {
        visibility_->run(task);
        prepared.fetch_add(1, std::memory_order_release);
        return;
      }
      while (prepared.load(std::memory_order_acquire) < mask_tasks) std::this_thread::yield();
      const Wave::Entry& entry = wave.entries[static_cast<size_t>(task - mask_tasks)];
      std::byte* tiles = memory.data() + worker * worker_bytes;
      for (int64_t tile = 0; tile < entry.tiles.size(); ++tile) {
        kernel_.pack(plan_, entry.b, entry.head_k, entry.tiles.begin + tile,
                     tiles + tile * plan_.tile_bytes);
      }
      const int64_t group = problem_.heads_per_group();
      for (int64_t block = 0; block < group * ceil_div(problem_.seqlen_q, kBlockM); ++block) {
        kernel_.attend(plan_, entry.b, entry.head_k * group + block % group, block / group, tiles,
                       entry.tiles.begin, tiles + tiles_bytes);
      }
    };
    const auto tasks = mask_tasks + static_cast<int64_t>(wave.entries.size());
    run_dynamic(executor_, tasks, estimate(wave, visibility_.has_value()), work);
  }

  // One parallel region: the first wave's tasks that read the mask, those that pack, those that
  // attend. Tasks are taken in order, so when one that attends starts, all others are done or in
  // some thread's hands, and it waits for no more than their rest.
  void run_wave(const Wave& wave, bool first, std::byte* workspace, std::byte* scratch) {
    const bool read_mask = first && visibility_.has_value();
    const int64_t mask_tasks = read_mask ? visibility_->tasks() : 0;
    const int64_t prepare_tasks = mask_tasks + wave.tiles;
    const int64_t attend_tasks = static_cast<int64_t>(wave.entries.size()) *
                                 problem_.heads_per_group() * ceil_div(problem_.seqlen_q, kBlockM);
    std::atomic<int64_t> prepared{0};
    const auto work = [&](int64_t task, int64_t worker) {
      if (task < prepare_tasks) {
        if (task < mask_tasks) {
          visibility_->run(task);
        } else {
          pack(wave, task - mask_tasks, workspace);
        }
        prepared.fetch_add(1, std::memory_order_release);
        return;
      }
      while (prepared.load(std::memory_order_acquire) < prepare_tasks) std::this_thread::yield();
      attend(wave, task - prepare_tasks, workspace, scratch + worker * plan_.scratch_bytes);
    };
    const double nanoseconds = estimate(wave, read_mask);
    run_dynamic(executor_, prepare_tasks + attend_tasks, nanoseconds, work);
  }

  // Of a wave's work in one thread, in nanoseconds. The rates are guesses for AVX-512, not tuned: a
  // factor of two moves only the size from which a second thread helps.
  [[nodiscard]] double estimate(const Wave& wave, bool read_mask) const {
    constexpr double kMaskPerNs = 8.0, kPackedPerNs = 4.0, kMultipliesPerNs = 50.0;
    const auto mask_bytes = static_cast<double>(read_mask ? visibility_->bytes() : 0);
    const auto packed_bytes = static_cast<double>(wave.tiles * plan_.tile_bytes);
    const double multiplies = 2.0 *
                              static_cast<double>(problem_.heads_per_group() * problem_.seqlen_q) *
                              static_cast<double>(wave.tiles * plan_.block_n * problem_.head_dim);
    return mask_bytes / kMaskPerNs + packed_bytes / kPackedPerNs + multiplies / kMultipliesPerNs;
  }

  void pack(const Wave& wave, int64_t tile, std::byte* workspace) const {
    const auto after =
        std::upper_bound(wave.entries.begin(), wave.entries.end(), tile,
                         [](int64_t t, const Wave::Entry& entry) { return t < entry.offset; });
    const Wave::Entry& entry = *std::prev(after);  // the last to start at or before the tile
    kernel_.pack(plan_, entry.b, entry.head_k, entry.tiles.begin + tile - entry.offset,
                 workspace + tile * plan_.tile_bytes);
  }

  void attend(const Wave& wave, int64_t index, const std::byte* workspace,
              std::byte* scratch) const {
    const int64_t blocks = ceil_div(problem_.seqlen_q, kBlockM);
    const int64_t group = problem_.heads_per_group();
    const Wave::Entry& entry = wave.entries[static_cast<size_t>(index / (group * blocks))];
    const int64_t in_group = index / blocks % group;
    const int64_t block = blocks - 1 - index % blocks;  // of causal bands the longest first
    kernel_.attend(plan_, entry.b, entry.head_k * group + in_group, block,
                   workspace + entry.offset * plan_.tile_bytes, entry.tiles.begin, scratch);
  }

  const Problem& problem_;
  const Kernel& kernel_;
  const Executor& executor_;
  Plan plan_;
  std::optional<VisibilityMap> visibility_;
};

}  // namespace

void forward(const Problem& problem, const Executor& executor) {
  Forward(problem, *select_isa().kernel(problem.dtype), executor).run();
}

Choice choose(const Problem& problem) { return {isa(), kBlockM, block_n_of(problem)}; }

}  // namespace pfa::cpu
