//! What lies in registers and in memory between driver and unit: offsets, layouts and numbers of the "Intel
//! Virtualization Technology for Directed I/O" specification, and no behaviour.

pub mod descriptor;
pub mod fault;
pub mod register;
pub mod table;
