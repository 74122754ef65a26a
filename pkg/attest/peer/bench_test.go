package peer

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

func BenchmarkAccept(b *testing.B) {
	path := filepath.Join(b.TempDir(), "s")
	l, err := Listen(b.Context(), path, Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	for b.Loop() {
		c, err := net.Dial("unix", path)
		if err != nil {
			b.Fatal(err)
		}
		a, err := l.Accept()
		if err != nil {
			b.Fatal(err)
		}
		_ = a.Close()
		_ = c.Close()
	}
}

func BenchmarkAlive(b *testing.B) {
	p, err := Open(os.Getpid())
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	for b.Loop() {
		if err := p.Alive(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkProcessStatus(b *testing.B) {
	p, err := Open(os.Getpid())
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	for b.Loop() {
		proc, err := p.Process()
		if err != nil {
			b.Fatal(err)
		}
		if _, err := proc.Status(); err != nil {
			b.Fatal(err)
		}
		_ = proc.Close()
	}
}
