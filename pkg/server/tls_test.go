package server

import (
	"crypto/tls"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// Connections without a client certificate, which anybody can make, are bounded
// in number and in time.
func TestV_T2_AnonymousConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newConnections(8, 8, anonymousLife)
		admit := func() (net.Conn, net.Conn, bool) {
			ours, theirs := net.Pipe()
			conn, ok := c.admitAnonymous(tls.Server(ours, &tls.Config{}))
			return conn, theirs, ok
		}
		first, _, ok1 := admit()
		_, left, ok2 := admit()
		_, _, ok3 := admit()
		if !ok1 || !ok2 || ok3 {
			t.Fatalf("of three, two are to be admitted: %v %v %v", ok1, ok2, ok3)
		}
		if err := first.Close(); err != nil {
			t.Error(err)
		}
		first.Close()
		if c.anonymous.taken != 1 {
			t.Errorf("%d places are taken", c.anonymous.taken)
		}
		if _, _, ok := admit(); !ok {
			t.Error("a place that was given back is not free")
		}
		start := time.Now()
		if _, err := left.Read(make([]byte, 1)); err == nil || time.Since(start) != anonymousLife {
			t.Errorf("closed after %v: %v", time.Since(start), err)
		}
		synctest.Wait()
		if c.anonymous.taken != 0 {
			t.Errorf("%d places are taken", c.anonymous.taken)
		}
	})
}

// The holder of one X.509-SVID does not get all connections.
func TestV_T2_ConnectionsOfOneNode(t *testing.T) {
	c := newConnections(1, 1, anonymousLife)
	var last net.Conn
	for range maxConnsPerID {
		ours, _ := net.Pipe()
		conn, ok := c.track("spiffe://example.org/a", ours)
		if !ok {
			t.Fatal("refused too early")
		}
		last = conn
	}
	ours, _ := net.Pipe()
	if _, ok := c.track("spiffe://example.org/a", ours); ok {
		t.Error("one too many is admitted")
	}
	if _, ok := c.track("spiffe://example.org/b", ours); !ok {
		t.Error("another is refused")
	}
	last.Close()
	if _, ok := c.track("spiffe://example.org/a", ours); !ok {
		t.Error("a place that was given back is not free")
	}
}
