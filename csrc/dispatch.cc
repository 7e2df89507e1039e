#include "dispatch.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_M_ARM64)
#include <windows.h>
#endif

#include "packed_weight.h"

#if defined(DYBIT_AVX_VNNI)
#include <cpuid.h>
#endif

namespace dybit {
namespace {

#if defined(DYBIT_AVX_VNNI)
// Reads a bit of leaf 7 of the processor's features. Not all compilers have a name for it.
bool has_feature(int subleaf, int register_index, int bit) {
  unsigned found[4];
  return __get_cpuid_count(7, subleaf, &found[0], &found[1], &found[2], &found[3]) && found[register_index] >> bit & 1;
}
#endif

#if defined(__aarch64__) || defined(_M_ARM64)
bool has_dot_products() {
#if defined(__ARM_FEATURE_DOTPROD)
  return true;
#elif defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP, which old headers do not know
  return getauxval(AT_HWCAP) & kDotProducts;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#elif defined(_M_ARM64)
  return IsProcessorFeaturePresent(43);  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE, which old headers do not know
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> present() {
  std::vector<const Kernels*> sets{&kScalar};
#if defined(__aarch64__) || defined(_M_ARM64)
  sets.push_back(&kNeon);
  if (has_dot_products()) sets.push_back(&kNeonDot);
#endif
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  [[maybe_unused]] constexpr int kEax = 0, kEdx = 3;
  if (avx2) sets.push_back(&kAvx2);
#if defined(DYBIT_AVX_VNNI)
  if (avx2 && has_feature(1, kEax, 4)) sets.push_back(&kAvxVnni);
#endif
  if (avx512) sets.push_back(&kAvx512);
#if defined(DYBIT_AMX)
  const bool tiles = has_feature(0, kEdx, 24), bytes = has_feature(0, kEdx, 25);
  if (avx512 && tiles && bytes && amx_permitted()) sets.push_back(&kAmx);
#endif
#endif
  return sets;
}

// Small linear layers of every storage, kind of input and activation, with numbers from a fixed generator.
std::vector<float> sample(const Kernels& kernels) {
  std::vector<float> results;
  uint32_t state = 1;
  auto draw = [&state] { return (state = state * 1664525u + 1013904223u) >> 8; };
  constexpr int kRows = 19, kColumns = 77, kInputs = 21;
  int activation = 0;
  for (int bits : {2, 3, 4, 6, 7, 8}) {
    std::vector<int32_t> table(2 << bits);
    for (int i = 0; i < 2 << bits; ++i) {
      table[i] = int(draw() % (bits == 8 ? 8192 : 96)) - (bits == 8 ? 4096 : 48);
      // 7 bits: the form of Runs, two of the eight irregular
      if (bits == 7)
        table[i] = i / 16 % 4 == 3 ? int(draw() % 8192) - 4096 : i / 16 * 100 - 800 + i % 16 * (i / 16 - 7);
    }
    std::vector<uint8_t> packed(kRows * 80), choice(kRows * 2);
    for (auto& byte : packed) byte = uint8_t(draw());
    for (size_t i = 0; i < choice.size(); ++i) choice[i] = i % 2 ? uint8_t(draw() & 1) : 0;  // a group shares its table
    std::vector<float> scale(kRows * 2, 0.25f), x(kInputs * kColumns), steps{0.5f, 0.25f};
    for (auto& value : x) value = float(int(draw() % 4001) - 2000) / 500.0f;
    const Portable portable{packed.data(), kRows, kColumns, bits,         48,           scale.data(), true, true,
                            choice.data(), true,  true,     table.data(), steps.data(), 2};
    const InputFormat inputs[] = {{false, 0, 0, false, kColumns}, {true, 7, 1, true, kColumns}, {true, 8, 1, false, 40},
                                  {true, 7, 7, true, kColumns}};
    for (const InputFormat& input : inputs) {
      const PackedWeight weight(portable, input, kernels);
      for (int rows : {1, 3, 7, kInputs}) {
        std::vector<float> y(size_t(rows) * kRows);
        weight.linear(x.data(), rows, y.data(), nullptr, nullptr, nullptr, 1.5f, 1,
                      Activation(activation++ % kActivations));
        results.insert(results.end(), y.begin(), y.end());
      }
    }
  }
  return results;
}

std::vector<const Kernels*> checked() {
  std::vector<const Kernels*> good;
  const std::vector<float> expected = sample(kScalar);
  for (const Kernels* set : present()) {
    const std::vector<float> found = sample(*set);
    if (std::memcmp(found.data(), expected.data(), expected.size() * sizeof(float)) == 0) good.push_back(set);
  }
  return good;
}

const Kernels* find(const std::string& name) {
  for (const Kernels* set : available())
    if (name == set->name) return set;
  throw std::invalid_argument("the instruction set '" + name + "' is unknown, not on this machine, or failed its test");
}

const Kernels*& chosen() {
  static const Kernels* set = [] {
    const char* name = std::getenv("DYBIT_ISA");
    return name && *name ? find(name) : available().back();
  }();
  return set;
}

}  // namespace

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> sets = checked();
  return sets;
}

const Kernels& kernels() { return *chosen(); }

void use(const std::string& name) { chosen() = find(name); }

}  // namespace dybit
