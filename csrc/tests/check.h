// What every C++ test needs: a check that counts failures and prints the first ones.
#pragma once

#include <cstdio>

inline int failures = 0;

#define CHECK(condition, ...)                                 \
  do {                                                        \
    if (!(condition) && ++failures <= 20) {                   \
      printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);  \
      printf(__VA_ARGS__);                                    \
      printf("\n");                                           \
    }                                                         \
  } while (0)

inline int report() {
  printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
