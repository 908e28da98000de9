// Modulation on the CPU: hands the call to the kernels of the active instruction set.
#include "../simd/isa.h"
#include "params.h"

namespace selfforcing {

SELFFORCING_DECLARE_ISA(void modulated_layer_norm(const ModulatedLayerNormParams& params))
SELFFORCING_DECLARE_ISA(int64_t modulated_layer_norm_backward_workspace_floats(const FeatureShape& shape))
SELFFORCING_DECLARE_ISA(void modulated_layer_norm_backward(const ModulatedLayerNormBackwardParams& params))
SELFFORCING_DECLARE_ISA(void gated_residual(const GatedResidualParams& params))
SELFFORCING_DECLARE_ISA(int64_t gated_residual_backward_workspace_floats(const FeatureShape& shape))
SELFFORCING_DECLARE_ISA(void gated_residual_backward(const GatedResidualBackwardParams& params))

void modulated_layer_norm_cpu(const ModulatedLayerNormParams& params) {
  SELFFORCING_DISPATCH(modulated_layer_norm, params);
}

int64_t modulated_layer_norm_backward_workspace_floats_cpu(const FeatureShape& shape) {
  SELFFORCING_DISPATCH(modulated_layer_norm_backward_workspace_floats, shape);
}

void modulated_layer_norm_backward_cpu(const ModulatedLayerNormBackwardParams& params) {
  SELFFORCING_DISPATCH(modulated_layer_norm_backward, params);
}

void gated_residual_cpu(const GatedResidualParams& params) { SELFFORCING_DISPATCH(gated_residual, params); }

int64_t gated_residual_backward_workspace_floats_cpu(const FeatureShape& shape) {
  SELFFORCING_DISPATCH(gated_residual_backward_workspace_floats, shape);
}

void gated_residual_backward_cpu(const GatedResidualBackwardParams& params) {
  SELFFORCING_DISPATCH(gated_residual_backward, params);
}

}  // namespace selfforcing
