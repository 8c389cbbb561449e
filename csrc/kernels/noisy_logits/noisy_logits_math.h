// The arithmetic of one logit is what all rooms with noise share.
#pragma once

#include "core/perturb.h"
