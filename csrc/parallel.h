// The only file that knows OpenMP. The module links libgomp dynamically, so that torch's pool is
// ours too and torch.set_num_threads() reaches us. The fuzz defines FINEGATES_STD_THREADS, because
// ThreadSanitizer cannot see libgomp's barriers.
#pragma once

#ifdef FINEGATES_STD_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace finegates {

#ifdef FINEGATES_STD_THREADS

// The threads of one parallel().
class Team {
 public:
  explicit Team(int size) : size_(size) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long round = round_;
    if (++waiting_ == size_) {
      waiting_ = 0;
      ++round_;
      all_here_.notify_all();
    }
    all_here_.wait(lock, [&] { return round_ != round; });
  }

 private:
  const int size_;
  int waiting_ = 0;
  long round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_here_;
};

inline thread_local Team* team_of_thread = nullptr;

inline int max_threads() { return team_of_thread ? 1 : FINEGATES_STD_THREADS; }

template <class Body>
void parallel(int threads, const Body& body) {
  if (threads <= 1) return body();
  Team team(threads);
  const auto member = [&] {
    team_of_thread = &team;
    body();
    team_of_thread = nullptr;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(member);
  member();
  for (std::thread& other : others) other.join();
}

inline void barrier(int threads) {
  if (threads > 1) team_of_thread->wait();
}

#else

inline int max_threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Runs body() once on each of `threads` threads. body must not throw.
template <class Body>
void parallel(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body();
    return;
  }
#endif
  (void)threads;
  body();
}

// Where each thread of the enclosing parallel(threads) waits for the others. A body that runs alone
// waits for nobody: the barrier would be that of whatever region the caller is in.
inline void barrier(int threads) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp barrier
  }
#endif
  (void)threads;
}

#endif

}  // namespace finegates
