// Closes the region that target_begin-inl.h opened.
#pragma GCC pop_options
