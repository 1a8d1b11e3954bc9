#include "linear/linear_product.cuh"

namespace mplug2::linear {

template const char* run_product<fp16, QuickGelu>(const ProductParams<fp16>&, void*);

}  // namespace mplug2::linear
