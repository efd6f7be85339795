// Memory that a thread keeps between calls: a fresh half megabyte costs 128 page faults a call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "layout.h"

namespace finegates {

class Scratch {
 public:
  // At least `bytes`, aligned to a cache line, contents unspecified; null when there is no memory.
  uint8_t* get(size_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      memory_.reset(std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign));
      if (memory_) size_ = bytes;
    }
    return static_cast<uint8_t*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// What a thread's tasks work in, one after the other.
inline uint8_t* thread_scratch(size_t bytes) {
  static thread_local Scratch scratch;
  return scratch.get(bytes);
}

}  // namespace finegates
