package kube

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// clusterDomain is below which the names of Services are.
const clusterDomain = "cluster.local"

// serveDNS answers pods for the names of Services, as a cluster's DNS does: an address
// for SERVICE.NAMESPACE.svc.cluster.local, and that there is no other name.
func (c *Cluster) serveDNS(t testing.TB) {
	t.Helper()
	conn, err := (&net.ListenConfig{}).ListenPacket(t.Context(), "udp", net.JoinHostPort(c.HostIP, "53"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background()) // pods ask until the cluster stops
	served := make(chan struct{})
	c.stopDNS = func() {
		cancel()
		_ = conn.Close() // which ends the loop
		<-served
	}
	go func() {
		defer close(served)
		buffer := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue // of one question; who asked, asks again
			}
			if answer, err := c.answerDNS(ctx, buffer[:n]); err == nil {
				_, _ = conn.WriteTo(answer, from) // the same
			}
		}
	}()
}

func (c *Cluster) answerDNS(ctx context.Context, question []byte) ([]byte, error) {
	var parser dnsmessage.Parser
	header, err := parser.Start(question)
	if err != nil {
		return nil, err
	}
	q, err := parser.Question()
	if err != nil {
		return nil, err
	}
	answer := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: header.ID, Response: true, Authoritative: true, RecursionDesired: header.RecursionDesired, RecursionAvailable: true},
		Questions: []dnsmessage.Question{q},
	}
	address, err := c.serviceAddress(ctx, q.Name.String())
	switch {
	case err != nil:
		answer.RCode = dnsmessage.RCodeServerFailure
	case !address.IsValid():
		answer.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA:
		answer.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET, TTL: 5},
			Body:   &dnsmessage.AResource{A: address.As4()},
		}}
	}
	return answer.Pack()
}

// serviceAddress is that of the Service with a name of DNS; not valid if there is none.
func (c *Cluster) serviceAddress(ctx context.Context, name string) (address netip.Addr, err error) {
	service, ok := strings.CutSuffix(strings.ToLower(name), ".svc."+clusterDomain+".")
	name, namespace, ok2 := strings.Cut(service, ".")
	if !ok || !ok2 || strings.Contains(namespace, ".") {
		return address, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second) // who asked does not wait for longer
	defer cancel()
	var object struct {
		Spec struct {
			ClusterIP string `json:"clusterIP"`
		} `json:"spec"`
	}
	err = c.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/services/"+name, nil, &object)
	if status, ok := errors.AsType[*StatusError](err); ok && status.Code == http.StatusNotFound || err == nil && object.Spec.ClusterIP == "None" {
		return address, nil
	}
	if err != nil {
		return address, err
	}
	return netip.ParseAddr(object.Spec.ClusterIP)
}
