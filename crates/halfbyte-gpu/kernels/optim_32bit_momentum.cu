// halfbyte: exact
// One rule: a module of its own, so that no more is compiled or loaded than a program uses.
#define RULE momentum
#include "optim_32bit.inc.h"
