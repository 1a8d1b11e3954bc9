#include "linear/linear_product.cuh"

namespace mplug2::linear {

template const char* run_product<bf16, Identity>(const ProductParams<bf16>&, void*);

}  // namespace mplug2::linear
