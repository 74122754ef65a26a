package agent

import (
	"net"
	"sync"
)

// network is the way to the CA.
type network struct {
	mu    sync.Mutex // guards what follows
	down  bool
	hole  bool // what is sent is lost, and nobody notices
	conns []*lossyConn
	dials int
}

// lossyConn is a connection that a test can cut or make lose everything.
type lossyConn struct {
	net.Conn
	net *network
}

func (c *lossyConn) Write(b []byte) (int, error) {
	c.net.mu.Lock()
	hole := c.net.hole
	c.net.mu.Unlock()
	if hole {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

func (n *network) set(down bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down = down
	if down {
		for _, c := range n.conns {
			_ = c.Close()
		}
		n.conns = nil
	}
}
