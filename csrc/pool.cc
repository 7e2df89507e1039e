#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace dybit {
namespace {

constexpr int kSpins = 2000;  // a few microseconds: the next layer follows soon, and sleeping threads wake slowly

class Pool {
 public:
  void run(int count, int threads, const std::function<void(int)>& work) {
    std::unique_lock<std::mutex> busy(use_, std::try_to_lock);
    if (!busy || threads < 2 || count < 2) {
      for (int i = 0; i < count; ++i) work(i);
      return;
    }
    const int helpers = std::min(threads, count) - 1;
    while (int(workers_.size()) < helpers) {
      const int index = int(workers_.size());
      workers_.emplace_back([this, index] { serve(index); });
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      count_ = count;
      helpers_ = helpers;
      next_.store(0);
      running_.store(helpers);
      turn_.fetch_add(1);
    }
    wake_.notify_all();
    drain();
    for (int i = 0; running_.load() && i < 100 * kSpins; ++i) pause();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_.load() == 0; });
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    asm volatile("yield");
#endif
  }

  void drain() {
    for (int i; (i = next_.fetch_add(1)) < count_;) (*work_)(i);
  }

  void serve(int index) {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; turn_.load() == seen && i < kSpins; ++i) pause();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return turn_.load() != seen; });
        seen = turn_.load();
        if (index >= helpers_) continue;
      }
      drain();
      std::lock_guard<std::mutex> lock(mutex_);
      if (running_.fetch_sub(1) == 1) done_.notify_one();
    }
  }

  std::mutex use_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  int count_ = 0, helpers_ = 0;
  std::atomic<int> next_{0}, running_{0};
  std::atomic<uint64_t> turn_{0};
};

// Calls a function on each thread of an OpenMP team, the calling thread included.
using Team = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Torch's team, if torch is loaded. Its threads spin for a while after each operator, so a pool of our own would wait
// for their cores.
Team find_team() {
#if defined(__linux__)
  if (void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD))
    return reinterpret_cast<Team>(dlsym(torch, "GOMP_parallel"));
#endif
  return nullptr;
}

// Never destroyed: its threads wait until the process ends. A forked child has none of these threads, so it gets a new
// pool and no team.
std::atomic<Pool*> current{nullptr};
std::atomic<Team> team{nullptr};

void prepare() {
  static std::once_flag once;
  std::call_once(once, [] {
    current = new Pool;
    team = find_team();
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] {
      current = new Pool;
      team = nullptr;
    });
#endif
  });
}

struct Share {
  const std::function<void(int)>& work;
  int count;
  std::atomic<int> next{0};
};

}  // namespace

void parallel_for(int count, int threads, const std::function<void(int)>& work) {
  if (threads < 2 || count < 2) {
    for (int i = 0; i < count; ++i) work(i);
    return;
  }
  prepare();
  const Team all = team;
  if (!all) return current.load()->run(count, threads, work);
  // As many threads as torch uses, whatever the count: a smaller team would end the spare threads.
  Share share{work, count};
  all(
      [](void* data) {
        auto& share = *static_cast<Share*>(data);
        for (int i; (i = share.next.fetch_add(1)) < share.count;) share.work(i);
      },
      &share, unsigned(threads), 0);
}

}  // namespace dybit
