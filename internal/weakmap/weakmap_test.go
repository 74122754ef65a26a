package weakmap

import (
	"runtime"
	"testing"
	"time"
)

func TestMap(t *testing.T) {
	var m Map[[64]byte, int]
	a, b := new([64]byte), new([64]byte)
	*m.Get(a) = 1
	if *m.Get(a) != 1 || *m.Get(b) != 0 || m.Len() != 2 {
		t.Errorf("%d, %d of %d", *m.Get(a), *m.Get(b), m.Len())
	}
	runtime.KeepAlive(b)
	// Cleanups run in a goroutine of the runtime's, some time after a collection.
	for until := time.Now().Add(time.Minute); m.Len() > 1 && time.Now().Before(until); runtime.Gosched() {
		runtime.GC()
	}
	if *m.Get(a) != 1 || m.Len() != 1 {
		t.Errorf("%d are kept, one of them %d", m.Len(), *m.Get(a))
	}
	runtime.KeepAlive(a)
}
