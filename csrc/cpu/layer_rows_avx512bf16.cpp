// The kernels of layer_kernels.h for bfloat16 with AVX512-BF16, which rounds sixteen numbers at once.
#include "cpu/layer_rows.h"

namespace qpeft {

const LayerKernels<uint16_t> kAvx512Bf16LayerKernels = {rms_norm_rows<uint16_t>, rms_norm_rows_backward<uint16_t>,
                                                        gated_silu_rows<uint16_t>, gated_silu_rows_backward<uint16_t>,
                                                        rotary_tokens<uint16_t>};

}  // namespace qpeft
