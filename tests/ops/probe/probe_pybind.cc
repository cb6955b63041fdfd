#error "not part of the op library"
