#undef RULE
#undef RULED
#undef STATES
#undef FLOATS
#undef SECOND
#undef CARRIES
