// Ceilings of the calling core, measured: what a kernel's time is held against.
#pragma once

#include <cstddef>
#include <cstdint>

namespace finegates {

enum class Arithmetic { kFma, kDot };  // float32 multiply-add, bfloat16 dot product

// Multiply-adds times two a second at the level that serves this process; 0 where there is no
// measurement for it. Takes about 20 ms of the thread's own time.
double probe_flops(Arithmetic arithmetic);

// Bytes a second of one pass over `bytes` at `data`, as 1, 2 or else 4 streams that are prefetched
// so many lines ahead.
double probe_read(const uint8_t* data, size_t bytes, int streams, size_t ahead);

}  // namespace finegates
