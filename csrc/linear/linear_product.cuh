// The product x weight^T by CUTLASS 2.x for compute capability 8.x, with linear's epilogue as a tree of its visitors:
// bias, activation and residual are applied to the float32 sums while they leave the block, so that out is rounded once
// and no pass over it follows. Structure: CUTLASS, examples/47_ampere_gemm_universal_streamk (broadcast).
#pragma once
#include <cuda_runtime.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>
#include <cutlass/gemm/threadblock/threadblock_swizzle.h>
// Does not include what it needs: after the two above.
#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "linear/linear_epilogue.cuh"
#include "linear/linear_product.h"

namespace mplug2::linear {

// Eight warps of 64 x 64: the tile of cuBLAS's own large products. Three stages of 24 KB leave room on GPUs whose
// blocks have 99 KB, 8.6 and 8.9.
using ProductTile = cutlass::gemm::GemmShape<kProductRows, kProductColumns, 32>;
using ProductWarpTile = cutlass::gemm::GemmShape<64, 64, 32>;
using ProductInstruction = cutlass::gemm::GemmShape<16, 8, 16>;
constexpr int kProductStages = 3;
constexpr int kProductThreads = 256;
constexpr int kProductAccess = 8;  // numbers in 16 bytes
// Neighbouring blocks share up to 8 tiles of weight's rows, so that a wave of blocks reads little more than it must.
using ProductOrder = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;

template <class T>
using CutlassElement = std::conditional_t<std::is_same_v<T, bf16>, cutlass::bfloat16_t, cutlass::half_t>;

// ---- our functors, as VisitorCompute takes them ---------------------------------------------------------------------
template <class Fragment>
struct AddBias {
  MPLUG2_DEVICE Fragment operator()(const Fragment& sum, const Fragment& bias) const {
    Fragment pre;
    MPLUG2_UNROLL
    for (int i = 0; i < Fragment::kElements; ++i) pre[i] = add_bias(sum[i], bias[i]);
    return pre;
  }
};

template <class Activation>
struct Finish {
  template <class Fragment>
  struct Of {
    MPLUG2_DEVICE Fragment operator()(const Fragment& pre, const Fragment& residual) const {
      Fragment out;
      MPLUG2_UNROLL
      for (int i = 0; i < Fragment::kElements; ++i) out[i] = finish<Activation>(pre[i], residual[i]);
      return out;
    }
  };
};

// ---- visitors -------------------------------------------------------------------------------------------------------
namespace visitor = cutlass::epilogue::threadblock;

using ProductMap = visitor::OutputTileThreadLayout<ProductTile, ProductWarpTile, cutlass::half_t, kProductAccess>;
using RowMajor = cute::Stride<int64_t, cute::_1, cute::_0>;

// Of a tensor that may be absent: then no element is inside of it, so loads give zeros and stores do nothing.
template <class Visitor>
struct Optional : Visitor {
  using Visitor::Visitor;
  template <class Shape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, Shape shape) {
    if (this->params_ptr->ptr_aux == nullptr) cute::get<0>(shape) = 0;
    return Visitor::get_callbacks(tile, thread, shape);
  }
};

template <class T>
using Load = visitor::VisitorAuxLoad<ProductMap, CutlassElement<T>, RowMajor>;
template <class T>
using Store =
    visitor::VisitorAuxStore<ProductMap, CutlassElement<T>, cutlass::FloatRoundStyle::round_to_nearest, RowMajor>;
template <class T>
using Bias = visitor::VisitorRowBroadcast<ProductMap, CutlassElement<T>, cute::Stride<cute::_0, cute::_1, cute::_0>>;
template <template <class> class Function>
using Compute = visitor::VisitorCompute<Function, float, float, cutlass::FloatRoundStyle::round_to_nearest>;

template <class T>
using Pre = visitor::Sm80EVT<Optional<Store<T>>, visitor::Sm80EVT<Compute<AddBias>, visitor::VisitorAccFetch, Bias<T>>>;
template <class T, class Activation>
using Out =
    visitor::Sm80EVT<Store<T>, visitor::Sm80EVT<Compute<Finish<Activation>::template Of>, Pre<T>, Optional<Load<T>>>>;

// ---- the kernel -----------------------------------------------------------------------------------------------------
// NOTE: half_t as the output stands for 16 bits, also of bfloat16: visitors load and store, and CUTLASS's way of
// handing sums over through shared memory without bank conflicts is chosen for that name alone.
template <class T, class Activation>
using Product = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
    CutlassElement<T>, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kProductAccess,     //
    CutlassElement<T>, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, kProductAccess,  //
    cutlass::half_t, cutlass::layout::RowMajor, kProductAccess, float, float, cutlass::arch::OpClassTensorOp,
    cutlass::arch::Sm80, ProductTile, ProductWarpTile, ProductInstruction, Out<T, Activation>, ProductOrder,
    kProductStages, cutlass::arch::OpMultiplyAdd>::GemmKernel;

template <class T, class Activation>
MPLUG2_KERNEL(kProductThreads, 1)
product_kernel(const __grid_constant__ typename Product<T, Activation>::Params params) {
  using Gemm = Product<T, Activation>;
  Gemm::invoke(params, *reinterpret_cast<typename Gemm::SharedStorage*>(shared_memory()));
}

template <class T, class Activation>
const char* run_product(const ProductParams<T>& p, void* stream) {
  using Gemm = Product<T, Activation>;
  using Element = CutlassElement<T>;
  static_assert(Gemm::kThreadCount == kProductThreads);
  constexpr int shared_bytes = sizeof(typename Gemm::SharedStorage);
  static_assert(shared_bytes <= 99 * 1024, "a block of capability 8.6 and 8.9 has no more");

  const auto element = [](const T* data) { return reinterpret_cast<const Element*>(data); };
  const RowMajor of_out{p.width, {}, {}};
  const typename Out<T, Activation>::Arguments epilogue{
      {{{{}, {element(p.bias), Element(0), {}}, {}}, {reinterpret_cast<Element*>(p.pre), of_out}},
       {const_cast<Element*>(element(p.residual)), Element(0), of_out},
       {}},
      {reinterpret_cast<Element*>(p.out), of_out}};
  const typename Gemm::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, {p.rows, p.width, p.depth},
                                           /*batch_count=*/1, epilogue, p.x, p.weight, nullptr, nullptr, 0, 0, 0, 0,
                                           p.depth, p.depth, 0, 0);
  const typename Gemm::Params params(arguments, /*device_sms=*/0, /*sm_occupancy=*/0);
  const auto kernel = product_kernel<T, Activation>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<params.get_grid_dims(), kProductThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mplug2::linear
