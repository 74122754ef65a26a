// Package syslog sends records of the ledger to a syslog receiver, in the format of
// RFC 5424. It answers "which of these messages has the receiver read". It does not
// know what is in a record beyond what its structured data name.
//
// Syslog has no acknowledgements. Over TLS (RFC 5425) and TCP, each batch has a
// connection of its own: it counts as sent when the receiver has closed its side
// after ours, and so has read all. What a receiver keeps in memory after that is
// its own affair. Over UDP and Unix sockets nothing is known but what the kernel
// refuses.
package syslog

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/export"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

const (
	defaultMaxBytes = 8192 // RFC 5425 §4.3.1: receivers SHOULD be able to process 8192
	mostBytes       = 1 << 20
	datagramBytes   = 65_000
	headerBytes     = 3072 // of a message before its record, at most
	clip            = 256  // bytes of a value in structured data, as it is written

	timestamp = "2006-01-02T15:04:05.000000Z" // RFC 5424 §6.2.3
)

// facilities are those of RFC 5424 §6.2.1 that make sense here.
var facilities = map[string]int{
	"daemon": 3, "auth": 4, "authpriv": 10, "audit": 13,
	"local0": 16, "local1": 17, "local2": 18, "local3": 19, "local4": 20, "local5": 21, "local6": 22, "local7": 23,
}

// severities are those of RFC 5424 §6.2.1 for outcomes.
var severities = map[ledgerv1.Outcome]int{
	ledgerv1.Outcome_OUTCOME_SUCCESS: 6, // informational
	ledgerv1.Outcome_OUTCOME_REFUSED: 4, // warning
	ledgerv1.Outcome_OUTCOME_ERROR:   3, // error
}

// Config is the settings of one export to a syslog receiver.
type Config struct {
	// Address of the receiver, host:port; for transport unix, the path of its
	// socket, such as /dev/log.
	Address string `yaml:"address"`
	// How it is reached: tls (RFC 5425), tcp (RFC 6587, octet counting), udp
	// (RFC 5426) or unix (datagrams). Nothing tells of records that are lost on udp
	// and unix.
	Transport string `yaml:"transport" default:"tls"`
	// For transport tls.
	TLS export.TLS `yaml:"tls"`
	// How the record is written in the message: json (the ledger's own), cef or ocsf.
	Format string `yaml:"format" default:"json"`
	// The facility: daemon, auth, authpriv, audit (13), or local0 to local7.
	Facility string `yaml:"facility" default:"audit"`
	// The longest message that the receiver takes whole. A record that does not fit
	// is abridged, since receivers cut what is longer, or take the rest for another
	// message.
	MaxBytes int `yaml:"max_bytes" default:"8192"`
}

// Syslog is an export.Target.
type Syslog struct {
	config   Config
	host     string
	format   export.Format
	facility int
}

// New checks the settings. Its errors are *export.SettingErrors.
func New(c Config, formats export.Formats) (*Syslog, error) {
	t := &Syslog{config: c}
	var err error
	if t.config.Format == "" {
		t.config.Format = "json"
	}
	if t.format, err = formats.Get(t.config.Format, "json", "cef", "ocsf"); err != nil {
		return nil, err
	}
	if t.config.Facility == "" {
		t.config.Facility = "audit"
	}
	var known bool
	if t.facility, known = facilities[t.config.Facility]; !known {
		return nil, export.Bad("facility", "%q is none of daemon, auth, authpriv, audit, local0 to local7", c.Facility)
	}
	if t.config.MaxBytes == 0 {
		t.config.MaxBytes = defaultMaxBytes
	}
	if n := t.config.MaxBytes; n < defaultMaxBytes || n > mostBytes {
		return nil, export.Bad("max_bytes", "%d is out of range: write a number from %d to %d", n, defaultMaxBytes, mostBytes)
	}
	switch c.Transport {
	case "":
		t.config.Transport = "tls"
	case "tls", "tcp":
	case "udp", "unix":
		if t.config.MaxBytes > datagramBytes {
			return nil, export.Bad("max_bytes", "%d does not fit in a datagram: write %d or less", t.config.MaxBytes, datagramBytes)
		}
	default:
		return nil, export.Bad("transport", "%q is none of tls, tcp, udp, unix", c.Transport)
	}
	if t.config.Transport == "unix" {
		if !filepath.IsAbs(c.Address) {
			return nil, export.Bad("address", "%q is no path: write that of the receiver's socket, such as /dev/log", c.Address)
		}
	} else if t.host, err = export.Address("address", c.Address); err != nil {
		return nil, err
	}
	if t.config.Transport != "tls" {
		if c.TLS != (export.TLS{}) {
			return nil, export.Bad("tls", "transport %s has no TLS: write transport: tls", t.config.Transport)
		}
		return t, nil
	}
	_, err = c.TLS.Config(t.host)
	return t, err
}

// Send implements export.Target.
func (t *Syslog) Send(ctx context.Context, b export.Batch) error {
	messages := make([][]byte, 0, len(b.Entries))
	for _, e := range b.Entries {
		messages = append(messages, t.message(b.Journal, e))
	}
	switch t.config.Transport {
	case "udp":
		return t.datagrams(ctx, "udp", messages)
	case "unix":
		return t.datagrams(ctx, "unixgram", messages)
	default:
		return t.stream(ctx, messages)
	}
}

// datagrams sends each message as a datagram.
func (t *Syslog) datagrams(ctx context.Context, network string, messages [][]byte) (err error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, t.config.Address)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if err := bound(ctx, conn); err != nil {
		return err
	}
	for _, m := range messages {
		if _, err := conn.Write(m); err != nil {
			return err
		}
	}
	return nil
}

// stream sends the messages over a connection:
//
//  1. connect, and find out that the receiver is the one that is meant
//  2. write the messages, each behind its length (RFC 5425 §4.3)
//  3. say that this was all
//  4. wait until the receiver ends its side as well
//  5. find out that it ended after all had reached it, and not before
func (t *Syslog) stream(ctx context.Context, messages [][]byte) (err error) {
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", t.config.Address)
	if err != nil {
		return err
	}
	tcp := raw.(*net.TCPConn) // of network "tcp"
	closed := false
	defer func() {
		if !closed {
			err = errors.Join(err, tcp.Close())
		}
	}()
	if err := bound(ctx, tcp); err != nil {
		return err
	}
	var conn interface {
		io.ReadWriter
		CloseWrite() error
	} = tcp
	if t.config.Transport == "tls" {
		c, err := t.config.TLS.Config(t.host)
		if err != nil {
			return err
		}
		secured := tls.Client(tcp, c)
		if err := secured.HandshakeContext(ctx); err != nil {
			return err
		}
		conn = secured
	}
	var frames bytes.Buffer
	for _, m := range messages {
		fmt.Fprintf(&frames, "%d %s", len(m), m)
	}
	if _, err := conn.Write(frames.Bytes()); err != nil {
		return err
	}
	if err := conn.CloseWrite(); err != nil {
		return err
	}
	if conn != any(tcp) {
		if err := tcp.CloseWrite(); err != nil {
			return err
		}
	}
	// Receivers say nothing (RFC 5425 §4.4): only the end is of interest, and not
	// all end TLS in good order.
	if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("wait until the receiver has read all: %w", err)
	}
	if err := reached(ctx, tcp); err != nil {
		return fmt.Errorf("the receiver closed the connection without reading: %w", err)
	}
	closed = true
	return tcp.Close()
}

// reached is step 5. A receiver that refuses a sender closes the connection, often
// before our messages are there; the end of its side then looks the same, but its
// kernel answers the messages with a reset instead of an acknowledgement.
func reached(ctx context.Context, conn *net.TCPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	for {
		var unacknowledged, failure int
		var cerr error
		err := raw.Control(func(fd uintptr) {
			var oerr error
			unacknowledged, oerr = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
			var gerr error
			failure, gerr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR) // after the queue: a reset empties it
			cerr = errors.Join(oerr, gerr)
		})
		switch {
		case errors.Join(err, cerr) != nil:
			return errors.Join(err, cerr)
		case failure != 0:
			return unix.Errno(failure)
		case unacknowledged == 0:
			return nil
		}
		if err := backoff.Wait(ctx, 2*time.Millisecond); err != nil {
			return err
		}
	}
}

// bound ends what happens on a connection at ctx's deadline, or soon.
func bound(ctx context.Context, conn net.Conn) error {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(time.Minute)
	}
	return conn.SetDeadline(deadline)
}

// message is RFC 5424's SYSLOG-MSG.
func (t *Syslog) message(journal string, e ledger.Entry) []byte {
	r := e.Record
	severity, known := severities[r.GetOutcome()]
	if !known {
		severity = 5 // notice
	}
	at := "-"
	if ts := r.GetTime(); ts != nil && ts.CheckValid() == nil {
		at = ts.AsTime().UTC().Format(timestamp)
	}
	record, abridged := export.Encode(t.format, e, t.config.MaxBytes-headerBytes)
	b := fmt.Appendf(nil, "<%d>1 %s %s meshid-ca - %s [meshid@32473", t.facility*8+severity, at,
		word(r.GetCaInstance(), 255), word(ledger.EventName(r.GetEvent()), 32))
	for _, p := range []struct{ name, value string }{
		{"journal", journal},
		{"index", strconv.FormatUint(e.Index, 10)},
		{"hash", hex.EncodeToString(e.Hash[:])},
		{"event", ledger.EventName(r.GetEvent())},
		{"outcome", ledger.OutcomeName(r.GetOutcome())},
		{"reason", r.GetReason()},
		{"spiffe_id", r.GetSpiffeId()},
		{"serial", hex.EncodeToString(r.GetCertificate().GetSerial())},
		{"node", r.GetNode().GetId()},
		{"entry", r.GetEntry().GetName()},
		{"actor", r.GetActor()},
		{"request_id", r.GetRequestId()},
	} {
		if p.value != "" {
			b = parameter(b, p.name, p.value)
		}
	}
	if abridged {
		b = parameter(b, "abridged", "true")
	}
	b = append(b, ']', ' ')
	return append(b, record...)
}

// parameter adds an SD-PARAM (RFC 5424 §6.3.3). A value that is too long when it is
// escaped ends with an ellipsis.
func parameter(b []byte, name, value string) []byte {
	b = append(append(append(b, ' '), name...), '=', '"')
	start := len(b)
	for _, r := range value {
		before := len(b)
		b = export.AppendVisible(b, string(r), func(b []byte, r rune) []byte {
			if r == '"' || r == '\\' || r == ']' {
				b = append(b, '\\')
			}
			return utf8.AppendRune(b, r)
		})
		if len(b)-start > clip {
			b = append(b[:before], "…"...)
			break
		}
	}
	return append(b, '"')
}

// word is s as a field of the header: printing US-ASCII without spaces.
func word(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return '_'
		}
		return r
	}, s)
	if s == "" {
		return "-"
	}
	return s[:min(len(s), limit)]
}
