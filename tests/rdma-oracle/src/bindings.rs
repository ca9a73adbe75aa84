//! What the bindings of `rdma-sys` say of something that is declared: `None` where they have nothing of that name, and
//! everywhere without the feature.

/// Where a field is. The first rules are for fields that stand in an inner structure or union there, or have no
/// counterpart.
#[cfg(feature = "rdma-sys")]
macro_rules! bound_offset {
    (ibv_device, _operations) => { None };
    (ibv_context_ops, _before_poll) => { None };
    (ibv_context_ops, _before_post) => { None };
    (ibv_context_ops, _after_post) => { None };
    (ibv_send_wr, _unused) => { None };
    (ibv_async_event, _rest_of_pointer) => { None };
    (rdma_cm_id, _rest_of_route) => { None };
    (rdma_cm_event, _unused) => { None };
    (ibv_send_wr, imm_data) => { bound_offset!(ibv_send_wr: imm_data_invalidated_rkey_union.imm_data) };
    (ibv_send_wr, remote_addr) => { bound_offset!(ibv_send_wr: wr.rdma.remote_addr) };
    (ibv_send_wr, rkey) => { bound_offset!(ibv_send_wr: wr.rdma.rkey) };
    (ibv_wc, imm_data) => { bound_offset!(ibv_wc: imm_data_invalidated_rkey_union.imm_data) };
    (ibv_async_event, port_num) => { bound_offset!(ibv_async_event: element.port_num) };
    (rdma_cm_id, src_storage) => { bound_offset!(rdma_cm_id: route.addr.src_addr_union.src_storage) };
    (rdma_cm_id, dst_storage) => { bound_offset!(rdma_cm_id: route.addr.dst_addr_union.dst_storage) };
    (rdma_cm_event, conn) => { bound_offset!(rdma_cm_event: param.conn) };
    ($structure:ident, $field:ident) => { bound_offset!($structure: $field) };
    ($structure:ident: $($path:tt)+) => { Some(std::mem::offset_of!(rdma_sys::$structure, $($path)+)) };
}

#[cfg(not(feature = "rdma-sys"))]
macro_rules! bound_offset {
    ($structure:ident, $field:ident) => {
        None
    };
}

/// How large a structure is.
#[cfg(feature = "rdma-sys")]
macro_rules! bound_size {
    ($structure:ident) => {
        Some(size_of::<rdma_sys::$structure>())
    };
}

#[cfg(not(feature = "rdma-sys"))]
macro_rules! bound_size {
    ($structure:ident) => {
        None
    };
}

/// A constant's value. Most enumerations are a module or a type there, and one without a name is not there.
#[cfg(feature = "rdma-sys")]
macro_rules! bound_value {
    (link_layer, $name:ident) => {
        None
    };
    (ibv_gid_type, $name:ident) => {
        Some(crate::bindings::Value::value(rdma_sys::$name))
    };
    ($enumeration:ident, $name:ident) => {
        Some(crate::bindings::Value::value(rdma_sys::$enumeration::$name))
    };
}

#[cfg(not(feature = "rdma-sys"))]
macro_rules! bound_value {
    ($enumeration:ident, $name:ident) => {
        None
    };
}

/// A function's type.
#[cfg(feature = "rdma-sys")]
macro_rules! bound_prototype {
    (_ibv_query_gid_table($($argument:ident),*)) => { None };
    ($function:ident($($argument:ident),*)) => {
        Some(std::any::type_name_of_val(
            &(rdma_sys::$function as unsafe extern "C" fn($(any!($argument)),*) -> _),
        ))
    };
}

#[cfg(not(feature = "rdma-sys"))]
macro_rules! bound_prototype {
    ($function:ident($($argument:ident),*)) => {
        None
    };
}

/// A type that the compiler finds out.
#[cfg(feature = "rdma-sys")]
macro_rules! any {
    ($argument:ident) => {
        _
    };
}

/// The number behind a constant of the bindings, which have them as numbers, newtypes and enumerations.
#[cfg(feature = "rdma-sys")]
pub(crate) trait Value {
    fn value(self) -> i64;
}

#[cfg(feature = "rdma-sys")]
macro_rules! values {
    ($($type:ty, $constant:ident => $number:expr;)*) => {$(
        impl Value for $type {
            fn value(self) -> i64 {
                let $constant = self;
                i64::from($number)
            }
        }
    )*};
}

#[cfg(feature = "rdma-sys")]
values! {
    u32, number => number;
    i32, number => number;
    rdma_sys::ibv_access_flags, flags => flags.0;
    rdma_sys::ibv_qp_attr_mask, flags => flags.0;
    rdma_sys::ibv_send_flags, flags => flags.0;
    rdma_sys::ibv_event_type, kind => kind as u32;
}
