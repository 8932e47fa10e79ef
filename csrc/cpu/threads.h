// Work on several threads.
#pragma once

#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace correctnet {

// Calls work(i) for 0 <= i < count (at least 1), each on a thread of its own, the first on the calling one. Where the
// system has no more threads, the calling thread does the rest. Afterwards the first exception is rethrown.
template <class Work>
void on_threads(int64_t count, const Work& work) {
  std::vector<std::exception_ptr> errors(count);
  const auto run = [&](int64_t i) {
    try {
      work(i);
    } catch (...) {
      errors[i] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  try {
    for (int64_t i = 1; i < count; ++i) threads.emplace_back(run, i);
  } catch (const std::system_error&) {
  }
  run(0);
  for (int64_t i = int64_t(threads.size()) + 1; i < count; ++i) run(i);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace correctnet
