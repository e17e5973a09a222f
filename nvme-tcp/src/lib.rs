//! NVMe/TCP sessions. Empty so far: nothing here is supported yet.
