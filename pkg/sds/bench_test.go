package sds

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
	"github.com/meshid/meshid/test/self"
)

// The benchmarks speak to the server with a client of a few bytes, so that what is
// measured is the server: its memory, and its processor time.

// wireClient is one connection with streams of StreamSecrets.
type wireClient struct {
	t      testing.TB
	conn   net.Conn
	framer *http2.Framer
	hpack  *hpack.Encoder
	buf    *sliceWriter
	next   uint32
	data   map[uint32][]byte
}

type sliceWriter struct{ b []byte }

func (w *sliceWriter) Write(p []byte) (int, error) { w.b = append(w.b, p...); return len(p), nil }

func dialWire(t testing.TB, socket string) *wireClient {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	c := &wireClient{t: t, conn: conn, buf: &sliceWriter{}, next: 1, data: make(map[uint32][]byte)}
	c.hpack = hpack.NewEncoder(c.buf)
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
		t.Fatal(err)
	}
	c.framer = http2.NewFramer(conn, conn)
	if err := c.framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return c
}

// open opens a stream and sends its first request.
func (c *wireClient) open(first []byte) uint32 {
	c.t.Helper()
	id := c.next
	c.next += 2
	c.buf.b = c.buf.b[:0]
	for _, f := range [][2]string{
		{":method", "POST"},
		{":scheme", "http"},
		{":path", "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"},
		{":authority", "agent_sds"},
		{"te", "trailers"},
		{"content-type", "application/grpc"},
		{"x-envoy-internal", "true"},
		{"x-forwarded-for", "192.0.2.2"},
	} {
		if err := c.hpack.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			c.t.Fatal(err)
		}
	}
	if err := c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: c.buf.b, EndHeaders: true}); err != nil {
		c.t.Fatal(err)
	}
	c.send(id, first)
	return id
}

// send sends one message.
func (c *wireClient) send(id uint32, m []byte) {
	c.t.Helper()
	message := append([]byte{0, byte(len(m) >> 24), byte(len(m) >> 16), byte(len(m) >> 8), byte(len(m))}, m...)
	var frames []byte // not by the framer, which would keep a buffer as large
	for len(message) > 0 {
		n := min(len(message), 16<<10)
		frames = append(frames, byte(n>>16), byte(n>>8), byte(n), byte(http2.FrameData), 0, byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
		frames = append(frames, message[:n]...)
		message = message[n:]
	}
	if _, err := c.conn.Write(frames); err != nil {
		c.t.Fatal(err)
	}
}

// receive reads until a stream has a whole message.
func (c *wireClient) receive() (id uint32, m *discoveryv3.DiscoveryResponse) {
	c.t.Helper()
	for {
		f, err := c.framer.ReadFrame()
		if err != nil {
			c.t.Fatal(err)
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = c.framer.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				err = c.framer.WritePing(true, f.Data)
			}
		case *http2.DataFrame:
			id = f.StreamID
			c.data[id] = append(c.data[id], f.Data()...)
			n := uint32(len(f.Data()))
			if err = c.framer.WriteWindowUpdate(0, n); err == nil {
				err = c.framer.WriteWindowUpdate(id, n)
			}
			b := c.data[id]
			if len(b) < 5 {
				break
			}
			size := int(b[1])<<24 | int(b[2])<<16 | int(b[3])<<8 | int(b[4])
			if len(b) < 5+size {
				break
			}
			m = &discoveryv3.DiscoveryResponse{}
			if err := proto.Unmarshal(b[5:5+size], m); err != nil {
				c.t.Fatal(err)
			}
			delete(c.data, id)
			return id, m
		case *http2.GoAwayFrame, *http2.RSTStreamFrame:
			c.t.Fatal(f)
		}
		if err != nil {
			c.t.Fatal(err)
		}
	}
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// firstRequest is what Envoy 1.40 sends at first: 61 kB, nearly all of it its node.
func firstRequest(t testing.TB, names ...string) []byte {
	t.Helper()
	node := &corev3.Node{Id: "sidecar", Cluster: "shop", UserAgentName: "envoy"}
	for i := range 516 {
		node.Extensions = append(node.Extensions, &corev3.Extension{
			Name: fmt.Sprintf("envoy.filters.http.extension_%03d", i), Category: "envoy.filters.http",
			TypeUrls: []string{fmt.Sprintf("envoy.extensions.filters.http.extension_%03d.v3.E", i)},
		})
	}
	return marshal(t, &discoveryv3.DiscoveryRequest{Node: node, TypeUrl: TypeURL, ResourceNames: names})
}

// benchRig is a server on a real socket with the real listener.
type benchRig struct {
	source *identitytest.Source
	server *Server
	socket string
}

func newBenchRig(b testing.TB, snapshot *identity.Snapshot) *benchRig {
	b.Helper()
	r := &benchRig{source: identitytest.NewSource(snapshot), socket: filepath.Join(b.TempDir(), "s")}
	var err error
	if r.server, err = New(r.source, Options{}); err != nil {
		b.Fatal(err)
	}
	listener, err := peer.Listen(b.Context(), r.socket, peer.Options{})
	if err != nil {
		b.Fatal(err)
	}
	g := grpc.NewServer(append(ServerOptions(), grpc.Creds(peer.Credentials()))...)
	r.server.Register(g)
	served := make(chan error, 1)
	go func() { served <- g.Serve(listener) }()
	b.Cleanup(func() {
		r.server.Close()
		g.Stop()
		<-served
	})
	return r
}

// settledMemory returns what the program has in use, heap and stacks, after
// collecting what it does not.
func settledMemory() (bytes uint64, goroutines int) {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse, runtime.NumGoroutine()
}

// BenchmarkMemoryPerStream reports what an open, served and silent stream costs,
// client included: 1,000 streams on 20 connections, as sidecars have them, and
// 1,000 on as many connections.
func BenchmarkMemoryPerStream(b *testing.B) {
	for _, perConn := range []int{50, 1} {
		b.Run(fmt.Sprintf("streams_per_connection_%d", perConn), func(b *testing.B) {
			a := identitytest.NewAuthority(b, "a.test")
			r := newBenchRig(b, a.Snapshot(1, a.SVID("/x")))
			first := firstRequest(b, nameDefault)
			for b.Loop() {
				const streams = 1000
				before, goroutines := settledMemory()
				var clients []*wireClient
				for range streams / perConn {
					c := dialWire(b, r.socket)
					clients = append(clients, c)
					for range perConn {
						c.open(first)
						id, m := c.receive()
						c.send(id, marshal(b, &discoveryv3.DiscoveryRequest{
							TypeUrl: TypeURL, ResourceNames: []string{nameDefault},
							VersionInfo: m.GetVersionInfo(), ResponseNonce: m.GetNonce(),
						}))
					}
				}
				after, now := settledMemory()
				b.ReportMetric(float64(after-before)/streams, "B/stream")
				b.ReportMetric(float64(now-goroutines)/streams, "goroutines/stream")
				for _, c := range clients {
					_ = c.conn.Close()
				}
			}
		})
	}
}

// BenchmarkFirstSecret reports what a new connection with its first stream costs
// until its secret has come, with the SVID at hand: time, and processor time of
// client and server together.
func BenchmarkFirstSecret(b *testing.B) {
	a := identitytest.NewAuthority(b, "a.test")
	r := newBenchRig(b, a.Snapshot(1, a.SVID("/x")))
	first := firstRequest(b, nameDefault)
	start := self.CPU(b)
	for b.Loop() {
		c := dialWire(b, r.socket)
		c.open(first)
		c.receive()
		_ = c.conn.Close()
	}
	b.ReportMetric(float64((self.CPU(b)-start).Microseconds())/float64(b.N), "cpu-µs/op")
}

// BenchmarkPush reports what it takes until 1,000 streams have a new SVID each and
// have acknowledged it.
func BenchmarkPush(b *testing.B) {
	a := identitytest.NewAuthority(b, "a.test")
	r := newBenchRig(b, a.Snapshot(1, a.SVID("/x")))
	first := marshal(b, &discoveryv3.DiscoveryRequest{TypeUrl: TypeURL, ResourceNames: []string{nameDefault}})
	const streams, perConn = 1000, 50
	type ack struct{}
	acked := make(chan ack, streams)
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	for range streams / perConn {
		c := dialWire(b, r.socket)
		defer c.conn.Close()
		for range perConn {
			c.open(first)
		}
		go func() {
			for ctx.Err() == nil {
				f, err := c.framer.ReadFrame()
				if err != nil {
					return
				}
				d, ok := f.(*http2.DataFrame)
				if !ok {
					continue
				}
				nonce := nonceOf(d.Data()[5:])
				n := uint32(len(d.Data()))
				id := d.StreamID
				if c.framer.WriteWindowUpdate(0, n) != nil || c.framer.WriteWindowUpdate(id, n) != nil {
					return
				}
				m, err := proto.Marshal(&discoveryv3.DiscoveryRequest{TypeUrl: TypeURL, ResourceNames: []string{nameDefault}, ResponseNonce: nonce})
				if err != nil || c.framer.WriteData(id, false, append([]byte{0, 0, 0, 0, byte(len(m))}, m...)) != nil {
					return
				}
				acked <- ack{}
			}
		}()
	}
	wait := func() {
		for range streams {
			<-acked
		}
	}
	wait()
	start := self.CPU(b)
	for b.Loop() {
		r.source.Publish(a.Snapshot(1, a.SVID("/x")))
		wait()
	}
	b.ReportMetric(float64((self.CPU(b)-start).Microseconds())/float64(b.N)/streams, "cpu-µs/stream")
}

// nonceOf returns the nonce of an encoded response.
func nonceOf(m []byte) string {
	for len(m) > 0 {
		number, kind, n := protowire.ConsumeTag(m)
		if n < 0 {
			return ""
		}
		m = m[n:]
		if n = protowire.ConsumeFieldValue(number, kind, m); n < 0 {
			return ""
		}
		if number == 5 {
			v, _ := protowire.ConsumeString(m)
			return v
		}
		m = m[n:]
	}
	return ""
}
