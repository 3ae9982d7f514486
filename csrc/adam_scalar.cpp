// The path for any CPU: one element at a time, fused multiply-add from the C library where the CPU has none.
#include "adam_lanes.hpp"

namespace fuyou {

const AdamPath adam_scalar_path = make_path<ScalarLanes>("scalar");

}  // namespace fuyou
