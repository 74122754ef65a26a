// Command client is a workload of a few bytes: it waits at a gate, asks the node
// agent for one secret over SDS as Envoy does, says when it came, and stays. It
// answers "how long does a new process wait", with as little of its own in the
// figure as can be: no gRPC library, no poller, one write and one read.
//
//	client SOCKET RESOURCE NODE_BYTES [once]
//
// The gate is its standard input: it goes on when that ends. On its standard
// output it says "ready", and then "secret BEGIN END LEAF": the times in
// nanoseconds of the monotonic clock, which all processes of a machine share, and
// the certificate, so that it can be seen whose it is. With "once" it ends then.
package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

func run(args []string) error {
	once := len(args) == 4 && args[3] == "once"
	if len(args) != 3 && !once {
		return errors.New("usage: client SOCKET RESOURCE NODE_BYTES [once]")
	}
	nodeBytes, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	c := &client{resource: args[1]}
	first := c.opening(nodeBytes)
	if c.fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	if err := say("ready\n"); err != nil {
		return err
	}
	for {
		n, err := unix.Read(0, make([]byte, 1))
		if n == 0 && err == nil {
			break
		}
		if err != nil && !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
	begin, err := monotonic()
	if err != nil {
		return err
	}
	if err := unix.Connect(c.fd, &unix.SockaddrUnix{Name: args[0]}); err != nil {
		return err
	}
	if err := c.write(first); err != nil {
		return err
	}
	for served := false; ; {
		m, err := c.message()
		if err != nil {
			return err
		}
		end, err := monotonic()
		if err != nil {
			return err
		}
		if err := c.acknowledge(m); err != nil {
			return err
		}
		if !served {
			served = true
			if err := say(fmt.Sprintf("secret %d %d %s\n", begin, end, leaf(m))); err != nil || once {
				return err
			}
		}
	}
}

// leaf returns the first certificate of a message, in the letters of PEM (RFC 7468).
func leaf(m []byte) []byte {
	_, after, _ := bytes.Cut(m, []byte("-----BEGIN CERTIFICATE-----"))
	base64, _, _ := bytes.Cut(after, []byte("-----END"))
	return bytes.ReplaceAll(base64, []byte("\n"), nil)
}

// say writes one line in one piece: many processes share the pipe.
func say(line string) error {
	_, err := unix.Write(1, []byte(line))
	return err
}

func monotonic() (int64, error) {
	var t unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t)
	return t.Nano(), err
}

// client is one connection with one stream of StreamSecrets.
type client struct {
	fd       int
	resource string
	in       []byte // read and not used yet
	data     []byte // of the stream, not a whole message yet
}

// Types of HTTP/2 frames, RFC 9113 §6.
const (
	frameData         = 0
	frameHeaders      = 1
	frameReset        = 3
	frameSettings     = 4
	framePing         = 6
	frameGoAway       = 7
	frameWindowUpdate = 8

	flagACK        = 1
	flagEndHeaders = 4
)

func frame(kind, flags byte, stream uint32, payload []byte) []byte {
	n := len(payload)
	b := []byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags} //nolint:gosec // at most 16 KiB
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(b, payload...)
}

// opening is all that the client sends at first: the preface, settings, headers
// and the first request, whose node is as large as Envoy's if nodeBytes says so.
func (c *client) opening(nodeBytes int) []byte {
	b := []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	b = append(b, frame(frameSettings, 0, 0, nil)...)
	var headers []byte
	for _, h := range [][2]string{
		{":method", "POST"},
		{":scheme", "http"},
		{":path", "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"},
		{":authority", "node_agent"},
		{"te", "trailers"},
		{"content-type", "application/grpc"},
	} { // each as a literal without indexing, RFC 7541 §6.2.2
		headers = append(headers, 0, byte(len(h[0]))) //nolint:gosec // all are short
		headers = append(headers, h[0]...)
		headers = append(headers, byte(len(h[1]))) //nolint:gosec // all are short
		headers = append(headers, h[1]...)
	}
	b = append(b, frame(frameHeaders, flagEndHeaders, 1, headers)...)
	node := protowire.AppendTag(nil, 1, protowire.BytesType) // id
	node = protowire.AppendString(node, "sidecar")
	for i := 0; len(node) < nodeBytes; i++ {
		var extension []byte
		extension = protowire.AppendTag(extension, 1, protowire.BytesType) // name
		extension = protowire.AppendString(extension, fmt.Sprintf("envoy.filters.http.extension_%03d", i))
		extension = protowire.AppendTag(extension, 2, protowire.BytesType) // category
		extension = protowire.AppendString(extension, "envoy.filters.http"+strings.Repeat("_", 48))
		node = protowire.AppendTag(node, 9, protowire.BytesType) // extensions
		node = protowire.AppendBytes(node, extension)
	}
	return append(b, request(c.resource, node, "", "")...)
}

// request is a DiscoveryRequest in DATA frames.
func request(resource string, node []byte, version, nonce string) []byte {
	var m []byte
	field := func(n protowire.Number, v string) {
		if v != "" {
			m = protowire.AppendTag(m, n, protowire.BytesType)
			m = protowire.AppendString(m, v)
		}
	}
	field(1, version)
	field(2, string(node))
	field(3, resource)
	field(4, "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret")
	field(5, nonce)
	m = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(m))), m...) //nolint:gosec // some kilobytes
	var b []byte
	for len(m) > 0 {
		n := min(len(m), 16<<10)
		b = append(b, frame(frameData, 0, 1, m[:n])...)
		m = m[n:]
	}
	return b
}

// acknowledge answers a DiscoveryResponse.
func (c *client) acknowledge(m []byte) error {
	var version, nonce string
	for len(m) > 0 {
		number, kind, n := protowire.ConsumeTag(m)
		if n < 0 {
			return protowire.ParseError(n)
		}
		m = m[n:]
		if n = protowire.ConsumeFieldValue(number, kind, m); n < 0 {
			return protowire.ParseError(n)
		}
		if kind == protowire.BytesType {
			v, _ := protowire.ConsumeString(m)
			switch number {
			case 1:
				version = v
			case 5:
				nonce = v
			default:
			}
		}
		m = m[n:]
	}
	return c.write(request(c.resource, nil, version, nonce))
}

// message returns the next message of the stream.
func (c *client) message() ([]byte, error) {
	for {
		kind, flags, payload, err := c.frame()
		if err != nil {
			return nil, err
		}
		switch kind {
		case frameSettings:
			if flags&flagACK == 0 {
				err = c.write(frame(frameSettings, flagACK, 0, nil))
			}
		case framePing:
			if flags&flagACK == 0 {
				err = c.write(frame(framePing, flagACK, 0, payload))
			}
		case frameReset, frameGoAway:
			err = fmt.Errorf("the agent ended the stream: frame %d %x", kind, payload)
		case frameData:
			n := binary.BigEndian.AppendUint32(nil, uint32(len(payload))) //nolint:gosec // at most 16 MB
			if err = c.write(append(frame(frameWindowUpdate, 0, 0, n), frame(frameWindowUpdate, 0, 1, n)...)); err != nil {
				return nil, err
			}
			c.data = append(c.data, payload...)
			if len(c.data) < 5 {
				continue
			}
			if end := 5 + int(binary.BigEndian.Uint32(c.data[1:])); len(c.data) >= end {
				m := c.data[5:end]
				c.data = c.data[end:]
				return m, nil
			}
		default:
		}
		if err != nil {
			return nil, err
		}
	}
}

// frame reads one frame; the payload is valid until the next call.
func (c *client) frame() (kind, flags byte, payload []byte, err error) {
	for {
		if len(c.in) >= 9 {
			if end := 9 + int(c.in[0])<<16 + int(c.in[1])<<8 + int(c.in[2]); len(c.in) >= end {
				kind, flags, payload = c.in[3], c.in[4], c.in[9:end:end]
				c.in = c.in[end:]
				return kind, flags, payload, nil
			}
		}
		buf := make([]byte, 8<<10)
		n, err := unix.Read(c.fd, buf)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 0, 0, nil, err
		case n == 0:
			return 0, 0, nil, errors.New("the agent closed the connection")
		default:
			c.in = append(c.in, buf[:n]...)
		}
	}
}

func (c *client) write(b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(c.fd, b)
		if err != nil && !errors.Is(err, syscall.EINTR) {
			return err
		}
		b = b[max(n, 0):]
	}
	return nil
}
