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
		c := newConnections(Limits{Handshakes: 8, Anonymous: 8})
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
