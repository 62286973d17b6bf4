// halfbyte: exact
// One rule: a module of its own, so that no more is compiled or loaded than a program uses.
#define RULE schedule_free_adamw
#include "optim_8bit.inc.h"
