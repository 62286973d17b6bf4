// After `#define RULE adam`: what the rule is called and has. See optim_rules.h.
#ifndef RULE
#error "define RULE before including optim_rule.h"
#endif
#define RULED(what) PASTE(PASTE(RULE, _), what)
#define STATES RULED(STATES)
#define FLOATS RULED(FLOATS)
#define SECOND RULED(SECOND)
#define CARRIES RULED(CARRIES)
