// A model of device.cuh for a C++ compiler: blocks run one after the other on the host, each with all its threads.
//
// The model is adversarial, so that incorrect kernels fail: dynamic shared memory is initialised with NaN; a cp.async
// writes when it is waited for, or never; threads run ahead of each other as far as barriers allow. Threads are fibers
// that switch at barriers only, so that failures are reproducible; every other block runs them in descending order,
// since a missing barrier may be harmless in one order. Under a sanitizer (or with CORRECTNET_SHIM_THREADS) they are
// system threads, so that ThreadSanitizer can find races.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define CORRECTNET_SHIM_THREADS
#endif

#define CN_DEVICE inline
#define CN_KERNEL(threads, blocks) void
#define CN_CONSTANT const
#define CN_ARGUMENTS(type) const type

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

// ---- the runtime: device memory is host memory, and a stream runs at once -------------------------------------------

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorMemoryAllocation,
  cudaErrorInvalidConfiguration,
  cudaErrorInsufficientDriver,
  cudaErrorInvalidDevice,
  cudaErrorNoKernelImageForDevice,
  cudaErrorUnsupportedPtxVersion,
  cudaErrorInvalidDeviceFunction
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxGridDimY,
  cudaDevAttrMaxGridDimZ,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToDevice };

// Settings for tests. A small device: with few multiprocessors a block sweeps several tiles, and little shared memory
// forces slices of K.
constexpr int kShimDevices = 2;
inline int shim_shared_bytes = 99 << 10;
inline int shim_most_blocks = 65535;      // in the second and third dimension of a grid
inline const char* shim_failing = nullptr;  // the next call of this function fails,
inline cudaError_t shim_failure;            // with this

// Properties of the last launch, for tests to check.
inline int shim_launched_on, shim_launched_with;  // the device, and the shared memory that the kernel was allowed

// Per host thread, as in the runtime: the error of a failed call is kept until it is read.
inline thread_local cudaError_t shim_last_error = cudaSuccess;
inline thread_local int shim_device = 0;

inline cudaError_t shim_result(const char* call, cudaError_t error = cudaSuccess) {
  if (shim_failing && !strcmp(shim_failing, call)) {
    error = shim_failure;
    shim_failing = nullptr;
  }
  if (error != cudaSuccess) shim_last_error = error;
  return error;
}
inline cudaError_t cudaPeekAtLastError() { return shim_last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(shim_last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "error of the shim"; }

inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (const cudaError_t error = shim_result("cudaMalloc"); error != cudaSuccess) return error;
  *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return shim_result("", *p ? cudaSuccess : cudaErrorMemoryAllocation);
}
inline cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  memcpy(to, from, bytes);
  return shim_result("cudaMemcpy");
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return shim_result("cudaMemsetAsync");
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = shim_device;
  return shim_result("cudaGetDevice");
}
inline cudaError_t cudaSetDevice(int device) {
  const bool there = 0 <= device && device < kShimDevices;
  if (const auto error = shim_result("cudaSetDevice", there ? cudaSuccess : cudaErrorInvalidDevice); error != cudaSuccess)
    return error;
  shim_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 1; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shim_shared_bytes; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = shim_most_blocks; break;
    default: *value = 9;
  }
  return shim_result("cudaDeviceGetAttribute");
}

struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return shim_result("cudaFuncGetAttributes"); }

inline std::mutex shim_mutex;
inline std::map<std::pair<const void*, int>, int> shim_allowed;  // (kernel, device): bytes of shared memory
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  const std::lock_guard<std::mutex> lock(shim_mutex);
  shim_allowed[{kernel, shim_device}] = bytes;
  return shim_result("cudaFuncSetAttribute", bytes > shim_shared_bytes ? cudaErrorInvalidValue : cudaSuccess);
}

namespace correctnet {
namespace cuda {
namespace shim {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
  bool valid;
};

struct Thread {
  dim3 index;
  std::vector<Copy> copies;              // since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, not waited for
  int exchanges = 0;                     // between the lanes of the warp
  bool started = false, done = false;
  ucontext_t context;  // for the first switch; later ones are longjmps, without a system call
  jmp_buf here;
  std::unique_ptr<char[]> stack;
};

struct Block;
inline thread_local Block* block;
inline thread_local Thread* self;

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait();

 private:
  int threads_, arrived_ = 0;
  int64_t generation_ = 0;
#if defined(CORRECTNET_SHIM_THREADS)
  std::mutex mutex_;
  std::condition_variable released_;
#endif
};

// Two halves: lanes write to one while others may still read the other.
struct Warp {
  Barrier barrier{kWarp};
  char values[2][kWarp][32];
};

struct Block {
  dim3 index, grid;
  std::vector<Thread> threads;
  std::deque<Warp> warps;
  Barrier barrier;
  std::vector<char> shared_bytes;
  char* shared;
  std::function<void()> work;
  jmp_buf scheduler;

  Block(dim3 grid, int count, size_t bytes, std::function<void()> work)
      : grid(grid), threads(count), warps(count / kWarp), barrier(count), shared_bytes(bytes + 128), work(work) {
    shared = shared_bytes.data() + (128 - reinterpret_cast<uintptr_t>(shared_bytes.data()) % 128);
    for (int i = 0; i < count; ++i) threads[i].index = {unsigned(i), 0, 0};
  }
  Warp& warp() { return warps[self->index.x / kWarp]; }
  void begin(unsigned x, unsigned y, unsigned z) {
    index = {x, y, z};
    std::fill(shared_bytes.begin(), shared_bytes.end(), char(0xff));
    for (Thread& thread : threads) {
      thread.copies.clear();
      thread.groups.clear();
      thread.started = thread.done = false;
    }
  }
};

#if defined(CORRECTNET_SHIM_THREADS)

inline void Barrier::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t generation = generation_;
  if (++arrived_ == threads_) {
    arrived_ = 0;
    ++generation_;
    released_.notify_all();
  } else {
    released_.wait(lock, [&] { return generation_ != generation; });
  }
}

inline void run(Block& all) {
  const auto blocks = int64_t(all.grid.x) * all.grid.y * all.grid.z;
  const auto loop = [&](int i) {
    block = &all;
    self = &all.threads[i];
    for (int64_t b = 0; b < blocks; ++b) {
      if (i == 0) all.begin(b % all.grid.x, b / all.grid.x % all.grid.y, b / all.grid.x / all.grid.y);
      all.barrier.wait();
      all.work();
      all.barrier.wait();
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 0; i < all.threads.size(); ++i) threads.emplace_back(loop, int(i));
  for (std::thread& thread : threads) thread.join();
}

#else

inline void yield() {
  if (!_setjmp(self->here)) _longjmp(block->scheduler, 1);
}

// Runs the current thread until it yields.
__attribute__((noinline)) inline void resume() {
  if (_setjmp(block->scheduler)) return;
  if (self->started) _longjmp(self->here, 1);
  self->started = true;
  setcontext(&self->context);
}

inline void Barrier::wait() {
  const int64_t generation = generation_;
  if (++arrived_ == threads_) {
    arrived_ = 0;
    ++generation_;
  }
  while (generation_ == generation) yield();
}

inline void fiber() {
  block->work();
  self->done = true;
  yield();
}

inline void run(Block& all) {
  block = &all;
  for (Thread& thread : all.threads) thread.stack.reset(new char[kStackBytes]);
  const int count = int(all.threads.size());
  bool descending = false;
  for (unsigned z = 0; z < all.grid.z; ++z)
    for (unsigned y = 0; y < all.grid.y; ++y)
      for (unsigned x = 0; x < all.grid.x; ++x, descending = !descending) {
        all.begin(x, y, z);
        for (Thread& thread : all.threads) {
          getcontext(&thread.context);
          thread.context.uc_stack.ss_sp = thread.stack.get();
          thread.context.uc_stack.ss_size = kStackBytes;
          makecontext(&thread.context, fiber, 0);
        }
        for (int left = count; left > 0;)
          for (int i = 0; i < count; ++i) {
            self = &all.threads[descending ? count - 1 - i : i];
            if (self->done) continue;
            resume();
            left -= self->done;
          }
      }
}

#endif

// Every lane's value of this exchange, by lane.
template <class T>
const T* exchange(const T& value) {
  static_assert(sizeof(T) <= sizeof(Warp::values[0][0]), "");
  Warp& warp = block->warp();
  static thread_local T all[kWarp];
  auto& half = warp.values[self->exchanges++ % 2];
  memcpy(half[self->index.x % kWarp], &value, sizeof(T));
  warp.barrier.wait();
  for (int lane = 0; lane < kWarp; ++lane) memcpy(&all[lane], half[lane], sizeof(T));
  return all;
}

inline float bfloat16_half(uint32_t pair, int i) { return noise::from_bits(i ? pair & 0xffff0000 : pair << 16); }

}  // namespace shim

#define threadIdx (::correctnet::cuda::shim::self->index)
#define blockIdx (::correctnet::cuda::shim::block->index)
#define gridDim (::correctnet::cuda::shim::block->grid)

inline char* shared_memory() { return shim::block->shared; }
inline void __syncthreads() { shim::block->barrier.wait(); }

inline void atomicAdd(unsigned long long* p, unsigned long long n) { __atomic_fetch_add(p, n, __ATOMIC_RELAXED); }

template <int kBytes>
void cp_async(void* shared, const void* source, bool valid) {
  shim::self->copies.push_back({static_cast<char*>(shared), static_cast<const char*>(source), kBytes, valid});
}
inline void cp_async_commit() {
  shim::self->groups.push_back(std::move(shim::self->copies));
  shim::self->copies.clear();
}
template <int kPending>
void cp_async_wait() {
  for (auto& groups = shim::self->groups; groups.size() > kPending; groups.pop_front())
    for (const shim::Copy& copy : groups.front()) {
      if (reinterpret_cast<uintptr_t>(copy.to) % copy.bytes ||
          (copy.valid && reinterpret_cast<uintptr_t>(copy.from) % copy.bytes))
        abort();  // a misaligned address
      if (copy.valid)
        memcpy(copy.to, copy.from, copy.bytes);
      else
        memset(copy.to, 0, copy.bytes);
    }
}

// `kBytes` at once: a misaligned address is an error.
template <size_t kBytes>
void demand_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % kBytes) abort();
}
template <class Vector>
const Vector* vector_at(const void* p) {
  demand_aligned<sizeof(Vector)>(p);
  return static_cast<const Vector*>(p);
}
template <class Vector>
Vector* vector_at(void* p) {
  demand_aligned<sizeof(Vector)>(p);
  return static_cast<Vector*>(p);
}

inline void ldmatrix(uint32_t (&matrix)[4], const void* row) {
  demand_aligned<16>(row);
  const void* const* rows = shim::exchange(row);
  const int lane = int(shim::self->index.x % shim::kWarp);
  for (int i = 0; i < 4; ++i)
    memcpy(&matrix[i], static_cast<const char*>(rows[8 * i + lane / 4]) + 4 * (lane % 4), 4);
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragment {
    uint32_t a[4], b[2];
  };
  const Fragment* lanes = shim::exchange(Fragment{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = int(shim::self->index.x % shim::kWarp);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), col = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k)
      c[i] += shim::bfloat16_half(lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)], k % 2) *
              shim::bfloat16_half(lanes[col * 4 + k % 8 / 2].b[k / 8], k % 2);
  }
}

inline uint32_t pack_bfloat16(float low, float high) {
  return noise::bfloat16(low) | uint32_t(noise::bfloat16(high)) << 16;
}

inline float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

template <class T>
T shuffle_xor(T value, int lanes) {
  return shim::exchange(value)[(shim::self->index.x % shim::kWarp) ^ unsigned(lanes)];
}

}  // namespace cuda
}  // namespace correctnet

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 threads, void** arguments, size_t shared,
                             cudaStream_t) {
  int allowed = 48 << 10;
  {
    const std::lock_guard<std::mutex> lock(shim_mutex);
    const auto found = shim_allowed.find({reinterpret_cast<const void*>(kernel), shim_device});
    if (found != shim_allowed.end()) allowed = found->second;
  }
  const bool blocks = grid.x && grid.y && grid.z && grid.x <= 0x7fffffff && grid.y <= unsigned(shim_most_blocks) &&
                      grid.z <= unsigned(shim_most_blocks);
  const cudaError_t mistake = !blocks                    ? cudaErrorInvalidConfiguration
                              : shared > size_t(allowed) ? cudaErrorInvalidValue
                                                         : cudaSuccess;
  if (const cudaError_t error = shim_result("cudaLaunchKernel", mistake); error != cudaSuccess) return error;
  shim_launched_on = shim_device;
  shim_launched_with = allowed;
  namespace shim = correctnet::cuda::shim;
  shim::Block block(grid, int(threads.x), shared, [&] { kernel(*static_cast<const Arguments*>(arguments[0])); });
  shim::run(block);
  return cudaSuccess;
}
