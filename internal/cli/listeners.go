package cli

import (
	"net"
	"path/filepath"
	"strings"
)

// Listener is a setting whose value is where a program listens: host:port, or the path
// of a Unix socket.
type Listener struct{ Setting, Address string }

// CheckListeners says which settings name a place where another one listens already;
// bad reports a problem with a setting. What is no address, or off, is nobody's place.
func CheckListeners(listeners []Listener, bad func(setting, format string, args ...any)) {
	for i, l := range listeners {
		for _, earlier := range listeners[:i] {
			if !samePlace(earlier.Address, l.Address) {
				continue
			}
			change := "port"
			if isSocket(l.Address) {
				change = "path"
			}
			bad(l.Setting, "%q is taken by %s (%s); write another %s in one of them", l.Address, earlier.Setting, earlier.Address, change)
			break
		}
	}
}

// isSocket says whether a place is a Unix socket, which may be an abstract one.
func isSocket(place string) bool {
	return strings.HasPrefix(place, "/") || strings.HasPrefix(place, "@")
}

// samePlace says whether two listeners cannot be at a and b at the same time.
func samePlace(a, b string) bool {
	if isSocket(a) || isSocket(b) {
		return filepath.Clean(a) == filepath.Clean(b)
	}
	hostA, portA, errA := net.SplitHostPort(a)
	hostB, portB, errB := net.SplitHostPort(b)
	if errA != nil || errB != nil || portA != portB || portA == "0" { // which is any that is free
		return false
	}
	hostA, hostB = plainHost(hostA), plainHost(hostB)
	return hostA == "" || hostB == "" || hostA == hostB
}

// plainHost is one spelling of a host that is listened at; "" is all interfaces.
func plainHost(host string) string {
	if strings.EqualFold(host, "localhost") {
		return "127.0.0.1" // as Listen takes it
	}
	ip := net.ParseIP(host)
	switch {
	case ip == nil:
		return strings.ToLower(host)
	case ip.IsUnspecified():
		return "" // net.Listen has both families listen then
	default:
		return ip.String()
	}
}
