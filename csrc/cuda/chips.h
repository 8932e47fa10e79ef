// Chip samples of a launch.
#pragma once

#include <cstdint>

namespace correctnet {
namespace cuda {

// Chip samples by number, and the seed of their noise, both in device memory: a CUDA graph can be replayed with others.
struct Chips {
  const uint64_t* seed;
  const uint32_t* samples;
  int64_t count;

  Chips part(int64_t first, int64_t size) const { return {seed, samples + first, size}; }
};

}  // namespace cuda
}  // namespace correctnet
