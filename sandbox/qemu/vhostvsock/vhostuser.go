//go:build linux

package vhostvsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Requests of the front-end (QEMU), docs/interop/vhost-user.rst.
const (
	reqGetFeatures         = 1
	reqSetFeatures         = 2
	reqSetOwner            = 3
	reqResetOwner          = 4
	reqSetMemTable         = 5
	reqSetVringNum         = 8
	reqSetVringAddr        = 9
	reqSetVringBase        = 10
	reqGetVringBase        = 11
	reqSetVringKick        = 12
	reqSetVringCall        = 13
	reqSetVringErr         = 14
	reqGetProtocolFeatures = 15
	reqSetProtocolFeatures = 16
	reqGetQueueNum         = 17
	reqSetVringEnable      = 18
	reqGetConfig           = 24
	reqGetMaxMemSlots      = 36
	reqAddMemReg           = 37
	reqRemMemReg           = 38
)

const (
	messageVersion   = 1
	messageReply     = 1 << 2
	messageNeedReply = 1 << 3

	featureIndirect         = 1 << 28
	featureEventIdx         = 1 << 29
	featureProtocolFeatures = 1 << 30
	featureVersion1         = 1 << 32
	// offeredFeatures has no VHOST_F_LOG_ALL: QEMU can't migrate a vsock device.
	offeredFeatures = featureVersion1 | featureProtocolFeatures | featureEventIdx | featureIndirect

	protocolMQ                = 1 << 0
	protocolReplyAck          = 1 << 3
	protocolConfig            = 1 << 9
	protocolConfigureMemSlots = 1 << 15
	offeredProtocolFeatures   = protocolMQ | protocolReplyAck | protocolConfig | protocolConfigureMemSlots

	vringIndexMask = 0xff
	vringNoFD      = 1 << 8

	messageHeaderSize = 12
	// maxMessage is the largest body there is: a memory table of
	// maxMessageFDs regions, or a configuration space of 256 bytes.
	maxMessage     = 8 + maxMessageFDs*regionSpecSize
	maxMessageFDs  = 8 // VHOST_MEMORY_BASELINE_NREGIONS
	regionSpecSize = 32

	configHeaderSize = 12
	maxConfig        = 256

	// replyTimeout bounds a reply to a front-end that does not read.
	replyTimeout = 10 * time.Second
)

// message is a request. Its descriptors are open until taken or closed.
type message struct {
	request uint32
	flags   uint32
	body    []byte
	fds     []int
}

// takeFD returns the only descriptor of the message, which is then the caller's.
func (m *message) takeFD() (int, error) {
	if len(m.fds) != 1 {
		return -1, fmt.Errorf("%d descriptors, not 1", len(m.fds))
	}
	fd := m.fds[0]
	m.fds = nil
	return fd, nil
}

func (m *message) closeFDs() {
	for _, fd := range m.fds {
		_ = unix.Close(fd)
	}
	m.fds = nil
}

// readMessage reads the next request. io.EOF means that the front-end hung up
// between two of them.
func readMessage(c *net.UnixConn) (m *message, err error) {
	var header [messageHeaderSize]byte
	oob := make([]byte, unix.CmsgSpace(maxMessageFDs*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(header[:], oob)
	if err != nil {
		return nil, err
	}
	got := &message{}
	defer func() {
		if err != nil {
			got.closeFDs()
		}
	}()
	if oobn > 0 {
		if got.fds, err = receivedFDs(oob[:oobn]); err != nil {
			return nil, err
		}
	}
	if n == 0 {
		return nil, io.EOF
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return nil, fmt.Errorf("message with more than %d descriptors", maxMessageFDs)
	}
	if _, err := io.ReadFull(c, header[n:]); err != nil {
		return nil, fmt.Errorf("message header: %w", unexpected(err))
	}
	le := binary.LittleEndian
	got.request, got.flags = le.Uint32(header[:]), le.Uint32(header[4:])
	size := le.Uint32(header[8:])
	if got.flags&3 != messageVersion || got.flags&messageReply != 0 {
		return nil, fmt.Errorf("request %d: flags %#x", got.request, got.flags)
	}
	if size > maxMessage && size > configHeaderSize+maxConfig {
		return nil, fmt.Errorf("request %d: body of %d bytes", got.request, size)
	}
	got.body = make([]byte, size)
	if _, err := io.ReadFull(c, got.body); err != nil {
		return nil, fmt.Errorf("request %d: body of %d bytes: %w", got.request, size, unexpected(err))
	}
	return got, nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func receivedFDs(oob []byte) (fds []int, err error) {
	controls, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("ancillary data: %w", err)
	}
	for i := range controls {
		rights, rerr := syscall.ParseUnixRights(&controls[i])
		if rerr != nil {
			err = fmt.Errorf("ancillary data: %w", rerr)
			continue
		}
		fds = append(fds, rights...)
	}
	return fds, err
}

func writeReply(c *net.UnixConn, request uint32, body []byte) error {
	le := binary.LittleEndian
	b := make([]byte, messageHeaderSize, messageHeaderSize+len(body))
	le.PutUint32(b, request)
	le.PutUint32(b[4:], messageVersion|messageReply)
	le.PutUint32(b[8:], uint32(len(body)))
	if err := c.SetWriteDeadline(time.Now().Add(replyTimeout)); err != nil {
		return err
	}
	if _, err := c.Write(append(b, body...)); err != nil {
		return fmt.Errorf("reply to request %d: %w", request, err)
	}
	return nil
}

// parseRegion reads struct VhostUserMemoryRegion; b holds at least regionSpecSize.
func parseRegion(b []byte) regionSpec {
	le := binary.LittleEndian
	return regionSpec{guest: le.Uint64(b), size: le.Uint64(b[8:]), user: le.Uint64(b[16:]), offset: le.Uint64(b[24:])}
}
