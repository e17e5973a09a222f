//! What the command line tools share; nothing so far.
