//! The CSI driver. Empty so far: nothing here is supported yet.
