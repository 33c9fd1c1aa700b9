// A device guard and hooks that do nothing, so that a CPU build of torch accepts backward on fake CUDA tensors.
// Built and loaded by device.py, in a process of its own.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/detail/CUDAHooksInterface.h>

struct Guard : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  using S = c10::Stream; using D = c10::Device;
  D getDevice() const override { return D(c10::DeviceType::CUDA, 0); }
  D exchangeDevice(D) const override { return D(c10::DeviceType::CUDA, 0); }
  S getStream(D) const noexcept override { return S(S::DEFAULT, D(c10::DeviceType::CUDA, 0)); }
  S getNewStream(D, int p = 0) const override { return S(S::DEFAULT, D(c10::DeviceType::CUDA, 0)); }
  S exchangeStream(S) const noexcept override { return S(S::DEFAULT, D(c10::DeviceType::CUDA, 0)); }
  void record(void**, const S&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const S&) const override {}
  bool queryEvent(void*) const override { return true; }
};
static Guard impl;
static c10::impl::DeviceGuardImplRegistrar reg(c10::DeviceType::CUDA, &impl);
struct CUDAHooks : public at::CUDAHooksInterface {
  CUDAHooks() = default;
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
};
namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
}
