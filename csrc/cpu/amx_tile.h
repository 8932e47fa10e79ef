// Intel AMX tile instructions; with CORRECTNET_AMX_MODEL, a model of them in portable C++ after the pseudo-code of the
// Intel Architectures Software Developer's Manual, so that every machine can run the code that uses them. Tile numbers
// are template arguments. The model aborts where the hardware would fault; it cannot detect a missing permission to use
// tiles or a forgotten release.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace correctnet {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "the layout that LDTILECFG reads");

#if !defined(CORRECTNET_AMX_MODEL)

inline void tile_configure(const TileConfig& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* p, ptrdiff_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, ptrdiff_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// tile C (rows x 16 float32) += tile A (rows x 32 bfloat16) * tile B (16 x 16 pairs of bfloat16)
template <int C, int A, int B>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct TileState {
  TileConfig config;
  bool configured;
  uint8_t tile[8][16][64];
};
thread_local TileState tiles;

inline void tile_require(bool condition) {
  if (!condition) abort();  // #UD or #GP
}
inline bool tile_usable(int t) { return tiles.configured && tiles.config.rows[t] && tiles.config.row_bytes[t]; }

// Subnormals count as zero and become zero, whatever MXCSR says.
inline float tile_flush(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if (!(u & 0x7f800000)) u &= 0x80000000;
  memcpy(&f, &u, 4);
  return f;
}
inline float tile_bfloat16(const uint8_t* p) {
  uint16_t b;
  memcpy(&b, p, 2);
  const uint32_t u = uint32_t(b) << 16;
  float f;
  memcpy(&f, &u, 4);
  return tile_flush(f);
}

inline void tile_configure(const TileConfig& c) {
  tile_require(c.palette == 1 && c.start_row == 0);
  for (int t = 0; t < 8; ++t) tile_require(c.rows[t] <= 16 && c.row_bytes[t] <= 64);
  tiles.config = c;
  tiles.configured = true;
  memset(tiles.tile, 0, sizeof tiles.tile);
}
inline void tile_release() { tiles.configured = false; }

template <int T>
void tile_zero() {
  tile_require(tile_usable(T));
  memset(tiles.tile[T], 0, sizeof tiles.tile[T]);
}
template <int T>
void tile_load(const void* p, ptrdiff_t stride) {
  tile_zero<T>();
  for (int r = 0; r < tiles.config.rows[T]; ++r)
    memcpy(tiles.tile[T][r], static_cast<const char*>(p) + r * stride, tiles.config.row_bytes[T]);
}
template <int T>
void tile_store(void* p, ptrdiff_t stride) {
  tile_require(tile_usable(T));
  for (int r = 0; r < tiles.config.rows[T]; ++r)
    memcpy(static_cast<char*>(p) + r * stride, tiles.tile[T][r], tiles.config.row_bytes[T]);
}
// Even and odd positions are summed apart and in order, then added to C. A product of two bfloat16 is exact in float32,
// so a multiplication and an addition do what a fused multiply-add does.
template <int C, int A, int B>
void tile_dot() {
  static_assert(C != A && C != B && A != B, "#UD");
  const TileConfig& config = tiles.config;
  tile_require(tile_usable(C) && tile_usable(A) && tile_usable(B));
  const int rows = config.rows[C], columns = config.row_bytes[C] / 4, pairs = config.rows[B];
  tile_require(rows == config.rows[A] && columns == config.row_bytes[B] / 4 && config.row_bytes[A] == 4 * pairs);
  float b[16][2][16] = {};
  for (int k = 0; k < pairs; ++k)
    for (int n = 0; n < columns; ++n)
      for (int half = 0; half < 2; ++half) b[k][half][n] = tile_bfloat16(tiles.tile[B][k] + 4 * n + 2 * half);
  for (int m = 0; m < rows; ++m) {
    float sum[2][16] = {}, c[16];
    for (int k = 0; k < pairs; ++k)
      for (int half = 0; half < 2; ++half) {
        const float a = tile_bfloat16(tiles.tile[A][m] + 4 * k + 2 * half);
        for (int n = 0; n < 16; ++n) sum[half][n] = tile_flush(sum[half][n] + a * b[k][half][n]);
      }
    memcpy(c, tiles.tile[C][m], sizeof c);
    for (int n = 0; n < columns; ++n) c[n] = tile_flush(tile_flush(c[n]) + tile_flush(sum[0][n] + sum[1][n]));
    memcpy(tiles.tile[C][m], c, sizeof c);
  }
}

#endif

}  // namespace
}  // namespace correctnet
