#include "linear/linear_product.cuh"

namespace mplug2::linear {

template const char* run_product<bf16, QuickGelu>(const ProductParams<bf16>&, void*);

}  // namespace mplug2::linear
