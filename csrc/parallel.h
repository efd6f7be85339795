// The only file that knows OpenMP. The module links libgomp dynamically, so that torch's pool is
// ours too and torch.set_num_threads() reaches us.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace finegates {

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

}  // namespace finegates
