#include "noise/noise.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace correctnet {

Noise lognormal_noise(uint32_t layer, double sigma, double shift, uint32_t purpose) {
  // |z| <= kMaxNormal, and `noise::exp2` takes exponents up to kMaxExponent.
  constexpr double kMaxNormal = 6.34, kMaxExponent = 126, kLog2E = 1.4426950408889634;
  if (!(sigma >= 0 && (sigma * kMaxNormal + std::fabs(shift)) * kLog2E <= kMaxExponent))
    throw std::invalid_argument("noise: sigma " + std::to_string(sigma) + " with shift " + std::to_string(shift) +
                                " gives factors outside the range of float32");
  return {0, layer, 0, purpose, float(sigma * kLog2E), float(shift * kLog2E)};
}

Noise spread_noise(uint32_t layer, double sigma, double shift, const Faults& faults) {
  Noise noise = lognormal_noise(layer, sigma, shift);
  noise.kind = NoiseKind::lognormal;
  noise.faults = faults;
  return noise;
}

Noise gaussian_noise(uint32_t layer, const Faults& faults) { return {0, layer, 0, 0, 0, 0, NoiseKind::gaussian, faults}; }

}  // namespace correctnet
