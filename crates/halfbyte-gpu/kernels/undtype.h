// Ends what dtype.h began.
#undef T
