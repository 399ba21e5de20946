//go:build linux

package vhostvsock

import "encoding/binary"

// Operations, virtio 1.2 §5.10.6.
const (
	opRequest       = 1
	opResponse      = 2
	opReset         = 3
	opShutdown      = 4
	opData          = 5 // VIRTIO_VSOCK_OP_RW
	opCreditUpdate  = 6
	opCreditRequest = 7
)

const (
	typeStream = 1

	// hostCID is the well-known address of the host (§5.10.4).
	hostCID = 2

	// Flags of opShutdown: the sender will not receive, or not send, any more.
	shutReceive = 1
	shutSend    = 2
	shutBoth    = shutReceive | shutSend

	headerSize = 44

	// maxPayload is the largest packet that Linux drivers take
	// (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
	maxPayload = 64 << 10
)

// packet is struct virtio_vsock_hdr.
type packet struct {
	srcCID, dstCID   uint64
	srcPort, dstPort uint32
	size             uint32
	kind, op         uint16
	flags            uint32
	bufAlloc, fwdCnt uint32
}

func (p *packet) encode(b *[headerSize]byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], p.srcCID)
	le.PutUint64(b[8:], p.dstCID)
	le.PutUint32(b[16:], p.srcPort)
	le.PutUint32(b[20:], p.dstPort)
	le.PutUint32(b[24:], p.size)
	le.PutUint16(b[28:], p.kind)
	le.PutUint16(b[30:], p.op)
	le.PutUint32(b[32:], p.flags)
	le.PutUint32(b[36:], p.bufAlloc)
	le.PutUint32(b[40:], p.fwdCnt)
}

func decodePacket(b *[headerSize]byte) packet {
	le := binary.LittleEndian
	return packet{
		srcCID:   le.Uint64(b[0:]),
		dstCID:   le.Uint64(b[8:]),
		srcPort:  le.Uint32(b[16:]),
		dstPort:  le.Uint32(b[20:]),
		size:     le.Uint32(b[24:]),
		kind:     le.Uint16(b[28:]),
		op:       le.Uint16(b[30:]),
		flags:    le.Uint32(b[32:]),
		bufAlloc: le.Uint32(b[36:]),
		fwdCnt:   le.Uint32(b[40:]),
	}
}
