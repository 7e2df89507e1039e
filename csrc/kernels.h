// An instruction set: the functions that it implements and the types that they take.
#pragma once

#include <cstddef>
#include <cstdint>

#include "weight.h"

namespace dybit {

// How inputs are held: as FP32, or as significands that fit the type.
enum class InputKind : int { kFloat = 0, kSigned8 = 1, kUnsigned8 = 2, kSigned16 = 3 };

constexpr int element_bytes(InputKind kind) {
  return kind == InputKind::kFloat ? 4 : kind == InputKind::kSigned16 ? 2 : 1;
}

struct Input {
  int rows;
  InputKind kind;
  int max_input;                // largest magnitude of a significand
  const void* data;             // [rows][chunk_count · 32] of the kind's type, zero where padded
  const int32_t* segment_sums;  // [rows][segment_count] of significands; kSigned8 only
  const float* group_scales;    // [rows][segment_count], or null if a row has one scale
  const float* row_scales;      // [rows]; 1 if groups have scales
};

struct Output {
  float* data;  // [rows][stride]
  int64_t stride;
  const float* bias;  // [blocks · 16]
};

// Activations after a linear layer. All but kRelu are x · σ(x · q(x²)) with a polynomial q (generic/activation.inc).
enum class Activation : int { kNone = 0, kRelu, kGelu, kGeluTanh, kSilu, kQuickGelu };
constexpr int kActivations = 6;

// What follows a product: y = activation(product + bias) · factor + addend, every step rounded to FP32.
struct LinearFinish {
  const float* bias = nullptr;  // [outputs], or null
  Activation activation = Activation::kNone;
  const float* factor = nullptr;  // [rows][factor_stride], or null
  int64_t factor_stride = 0;
  const float* addend = nullptr;  // [rows][addend_stride], or null
  int64_t addend_stride = 0;

  bool is_bias_only() const { return activation == Activation::kNone && !factor && !addend; }
};

// How inputs are rounded to significands.
struct Rounding {
  int magnitude_bits, max_run;
  bool is_signed, dynamic;
  float reach;          // dynamic: the value that the largest magnitude becomes
  float scale, offset;  // static
};

struct EncodeTask {
  const float* x;  // [rows][x_stride]
  int64_t x_stride;
  int columns;
  const Rounding* rounding;
  const Segment* segments;
  int segment_count;
  int padded;  // columns of the result
  InputKind kind;
  void* data;
  int32_t* segment_sums;  // or null
  float* group_scales;    // or null
  float* row_scales;
  uint8_t* has_nan;
};

// The dynamic scale of a group, from the bits of its largest magnitude: that which maps it to reach, or a smaller one if
// `top`, the largest value of the format, would overflow. NaN if a value is NaN or infinite.
float dynamic_scale(uint32_t largest, float reach, float top);

constexpr int kLanes = 16;  // of a sum: element i belongs to lane i mod 16

struct CodeKernels;  // codes.h
struct RowKernels;   // row_kernels.h
struct PanelKernels;  // panel_kernels.h

struct Kernels {
  const char* name;
  int unit_blocks;  // blocks that share unpacked weights: the smallest piece of work for a thread
  // The kind of inputs of a sign and magnitude for a weight.
  InputKind (*input_kind)(Storage storage, int max_weight, int max_input, bool input_is_signed);
  void (*linear)(const Weight&, const Input&, const Output&, int first_block, int last_block);
  // Values of some blocks: FP32 [16 · blocks][columns], significand times scale, rounded once.
  void (*dequantize)(const Weight&, float* out, int first_block, int last_block);
  const CodeKernels* codes;
  const RowKernels* rows;
  // Multiplies bytes in registers at full speed and returns how many. Null without an instruction for it.
  int64_t (*multiply)(int64_t count);
  const PanelKernels* panels = nullptr;  // or null
};

extern const Kernels kScalar;
extern const CodeKernels kScalarCodes;
extern const RowKernels kScalarRows;
#if defined(__aarch64__) || defined(_M_ARM64)
extern const Kernels kNeon;
extern const Kernels kNeonDot;
extern const CodeKernels kNeonCodes;
extern const RowKernels kNeonRows;
#endif
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const CodeKernels kAvx2Codes;
extern const CodeKernels kAvx512Codes;
extern const RowKernels kAvx2Rows;
extern const RowKernels kAvx512Rows;
extern const PanelKernels kAvx2Panels;
extern const PanelKernels kAvx512Panels;
#endif
// Only with a compiler that knows the instructions. AMX also needs a way to ask the system for it.
#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define DYBIT_AVX_VNNI
extern const Kernels kAvxVnni;
extern const PanelKernels kAvxVnniPanels;
#if defined(__linux__)
#define DYBIT_AMX
extern const Kernels kAmx;
bool amx_permitted();  // asks once for the whole process
#endif
#endif

}  // namespace dybit
