//! The constants of `infiniband/verbs.h` and `rdma/rdma_cma.h` that are used, by the enumeration they belong to.

use std::ffi::{c_int, c_uint};

constants! {
    /// What carries the verbs.
    enum ibv_transport_type: c_int {
        IBV_TRANSPORT_IB = 0,
        IBV_TRANSPORT_IWARP = 1,
    }

    /// How a port is.
    enum ibv_port_state: c_uint {
        IBV_PORT_DOWN = 1,
        IBV_PORT_INIT = 2,
        IBV_PORT_ARMED = 3,
        IBV_PORT_ACTIVE = 4,
        IBV_PORT_ACTIVE_DEFER = 5,
    }

    /// Bytes of a packet's payload: 256 and, each, twice the one before.
    enum ibv_mtu: c_uint {
        IBV_MTU_256 = 1,
        IBV_MTU_4096 = 5,
    }

    /// What the wire is. (The enumeration has no name; its numbers stand in a byte.)
    enum link_layer: u8 {
        IBV_LINK_LAYER_INFINIBAND = 1,
        IBV_LINK_LAYER_ETHERNET = 2,
    }

    /// What an address stands for.
    enum ibv_gid_type: u32 {
        IBV_GID_TYPE_ROCE_V1 = 1,
        IBV_GID_TYPE_ROCE_V2 = 2,
    }

    /// What a device and a peer may do to registered memory.
    enum ibv_access_flags: c_uint {
        IBV_ACCESS_LOCAL_WRITE = 1 << 0,
        IBV_ACCESS_REMOTE_WRITE = 1 << 1,
    }

    /// What kind of queue pair: reliable and connected.
    enum ibv_qp_type: c_uint {
        IBV_QPT_RC = 2,
    }

    /// How far a queue pair is.
    enum ibv_qp_state: c_uint {
        IBV_QPS_INIT = 1,
        IBV_QPS_RTR = 2,
        IBV_QPS_RTS = 3,
        IBV_QPS_ERR = 6,
    }

    /// Which attributes of a queue pair are to be changed.
    enum ibv_qp_attr_mask: c_uint {
        IBV_QP_STATE = 1 << 0,
        IBV_QP_ACCESS_FLAGS = 1 << 3,
        IBV_QP_TIMEOUT = 1 << 9,
        IBV_QP_RETRY_CNT = 1 << 10,
        IBV_QP_RNR_RETRY = 1 << 11,
        IBV_QP_MIN_RNR_TIMER = 1 << 15,
    }

    /// What a work request does.
    enum ibv_wr_opcode: c_uint {
        IBV_WR_RDMA_WRITE = 0,
        IBV_WR_RDMA_WRITE_WITH_IMM = 1,
        IBV_WR_SEND = 2,
    }

    /// How it does it.
    enum ibv_send_flags: c_uint {
        IBV_SEND_SIGNALED = 1 << 1,
        IBV_SEND_INLINE = 1 << 3,
    }

    /// How it went.
    enum ibv_wc_status: c_uint {
        IBV_WC_SUCCESS = 0,
        IBV_WC_WR_FLUSH_ERR = 5,
    }

    /// What was received: a write of the peer's with an immediate.
    enum ibv_wc_opcode: c_uint {
        IBV_WC_RECV_RDMA_WITH_IMM = 129,
    }

    /// What happened to a device.
    enum ibv_event_type: c_uint {
        IBV_EVENT_CQ_ERR = 0,
        IBV_EVENT_QP_FATAL = 1,
        IBV_EVENT_QP_REQ_ERR = 2,
        IBV_EVENT_QP_ACCESS_ERR = 3,
        IBV_EVENT_DEVICE_FATAL = 8,
        IBV_EVENT_PORT_ERR = 10,
    }

    /// What happened to a connection, or to one in the making.
    enum rdma_cm_event_type: c_uint {
        RDMA_CM_EVENT_ADDR_RESOLVED = 0,
        RDMA_CM_EVENT_ADDR_ERROR = 1,
        RDMA_CM_EVENT_ROUTE_RESOLVED = 2,
        RDMA_CM_EVENT_ROUTE_ERROR = 3,
        RDMA_CM_EVENT_CONNECT_REQUEST = 4,
        RDMA_CM_EVENT_CONNECT_RESPONSE = 5,
        RDMA_CM_EVENT_CONNECT_ERROR = 6,
        RDMA_CM_EVENT_UNREACHABLE = 7,
        RDMA_CM_EVENT_REJECTED = 8,
        RDMA_CM_EVENT_ESTABLISHED = 9,
        RDMA_CM_EVENT_DISCONNECTED = 10,
        RDMA_CM_EVENT_DEVICE_REMOVAL = 11,
    }

    /// What kind of connection: reliable, with ports as TCP has them.
    enum rdma_port_space: c_uint {
        RDMA_PS_TCP = 0x0106,
    }
}
