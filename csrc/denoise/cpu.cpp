// Denoising steps on the CPU: hands the call to the kernels of the active instruction set.
#include "../simd/isa.h"
#include "params.h"

namespace selfforcing {

SELFFORCING_DECLARE_ISA(void denoise(const DenoiseParams& params))
SELFFORCING_DECLARE_ISA(void denoise_backward(const DenoiseBackwardParams& params))
SELFFORCING_DECLARE_ISA(void add_noise(const AddNoiseParams& params))
SELFFORCING_DECLARE_ISA(int64_t dmd_gradient_workspace_floats(const DmdGradientParams& params))
SELFFORCING_DECLARE_ISA(void dmd_gradient(const DmdGradientParams& params))

void denoise_cpu(const DenoiseParams& params) { SELFFORCING_DISPATCH(denoise, params); }

void denoise_backward_cpu(const DenoiseBackwardParams& params) { SELFFORCING_DISPATCH(denoise_backward, params); }

void add_noise_cpu(const AddNoiseParams& params) { SELFFORCING_DISPATCH(add_noise, params); }

int64_t dmd_gradient_workspace_floats_cpu(const DmdGradientParams& params) {
  SELFFORCING_DISPATCH(dmd_gradient_workspace_floats, params);
}

void dmd_gradient_cpu(const DmdGradientParams& params) { SELFFORCING_DISPATCH(dmd_gradient, params); }

}  // namespace selfforcing
