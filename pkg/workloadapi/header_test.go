package workloadapi

import (
	"context"
	"errors"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/meshid/meshid/test/identitytest"
)

// TestSpec_D01_D02_D03_D04_D05_D06_D07_HeaderIsDemanded: on all seven methods and on reflection.
func TestSpec_D01_D02_D03_D04_D05_D06_D07_HeaderIsDemanded(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
	first := func(c interface{ RecvMsg(any) error }, err error, m any) error {
		if err != nil {
			return err
		}
		return c.RecvMsg(m)
	}
	methods := map[string]struct {
		call func(context.Context) error
		ok   codes.Code
	}{
		"FetchX509SVID": {func(ctx context.Context) error {
			c, err := r.client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			return first(c, err, &workload.X509SVIDResponse{})
		}, codes.OK},
		"FetchX509Bundles": {func(ctx context.Context) error {
			c, err := r.client.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
			return first(c, err, &workload.X509BundlesResponse{})
		}, codes.OK},
		"FetchJWTSVID": {func(ctx context.Context) error {
			_, err := r.client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{})
			return err
		}, codes.Unimplemented},
		"FetchJWTBundles": {func(ctx context.Context) error {
			c, err := r.client.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
			return first(c, err, &workload.JWTBundlesResponse{})
		}, codes.Unimplemented},
		"ValidateJWTSVID": {func(ctx context.Context) error {
			_, err := r.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{})
			return err
		}, codes.Unimplemented},
		"FetchWITSVID": {func(ctx context.Context) error {
			c, err := r.client.FetchWITSVID(ctx, &workload.WITSVIDRequest{})
			return first(c, err, &workload.WITSVIDResponse{})
		}, codes.Unimplemented},
		"FetchWITBundles": {func(ctx context.Context) error {
			c, err := r.client.FetchWITBundles(ctx, &workload.WITBundlesRequest{})
			return first(c, err, &workload.WITBundlesResponse{})
		}, codes.Unimplemented},
		"ServerReflectionInfo": {func(ctx context.Context) error {
			c, err := grpc_reflection_v1.NewServerReflectionClient(r.conn).ServerReflectionInfo(ctx)
			if err != nil {
				return err
			}
			if err := c.Send(&grpc_reflection_v1.ServerReflectionRequest{
				MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{},
			}); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			_, err = c.Recv()
			return err
		}, codes.OK},
	}
	for name, m := range methods {
		for _, header := range [][]string{nil, {"True"}, {"TRUE"}, {"1"}, {""}, {"false"}, {"true", "true"}, {"true,true"}, {" true x"}} {
			ctx, cancel := context.WithCancel(metadata.NewOutgoingContext(t.Context(), metadata.MD{securityHeader: header}))
			if err := m.call(ctx); status.Code(err) != codes.InvalidArgument {
				t.Errorf("%s with %q: %v", name, header, err)
			}
			cancel()
		}
		ctx, cancel := context.WithCancel(withHeader(t.Context()))
		if err := m.call(ctx); status.Code(err) != m.ok {
			t.Errorf("%s: %v, want %s", name, err, m.ok)
		}
		cancel()
	}
}

// Envoy's discovery services share the socket and are exempt.
func TestHeaderExemption(t *testing.T) {
	for method, want := range map[string]codes.Code{
		"/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets":                   codes.OK,
		"/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources": codes.OK,
		"/SpiffeWorkloadAPI/FetchX509SVID":                                                codes.InvalidArgument,
		"/grpc.health.v1.Health/Check":                                                    codes.InvalidArgument,
		"/envoy.service.secret.v3.SecretDiscoveryServiceX/StreamSecrets":                  codes.InvalidArgument,
		"/SpiffeWorkloadAPI/envoy.service.secret.v3.SecretDiscoveryService/":              codes.InvalidArgument,
	} {
		if err := checkHeader(t.Context(), method); status.Code(err) != want {
			t.Errorf("%s: %v", method, err)
		}
	}
}

// TestSpec_D08_Reflection: the service is told about, with its seven methods, equal to the standard's
// file, and nothing else is.
func TestSpec_D08_Reflection(t *testing.T) {
	r := newRig(t, identitytest.NewSource(nil), Options{})
	c, err := grpc_reflection_v1.NewServerReflectionClient(r.conn).ServerReflectionInfo(withHeader(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(m *grpc_reflection_v1.ServerReflectionRequest) *grpc_reflection_v1.ServerReflectionResponse {
		t.Helper()
		if err := c.Send(m); err != nil {
			t.Fatal(err)
		}
		got, err := c.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	var services []string
	for _, s := range ask(&grpc_reflection_v1.ServerReflectionRequest{
		MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{},
	}).GetListServicesResponse().GetService() {
		services = append(services, s.GetName())
	}
	if diff := cmp.Diff([]string{"SpiffeWorkloadAPI"}, services); diff != "" {
		t.Error(diff)
	}
	file := &descriptorpb.FileDescriptorProto{}
	if err := proto.Unmarshal(ask(&grpc_reflection_v1.ServerReflectionRequest{
		MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "SpiffeWorkloadAPI"},
	}).GetFileDescriptorResponse().GetFileDescriptorProto()[0], file); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(file, protodesc.ToFileDescriptorProto(workload.File_workload_proto)) {
		t.Error("the file is another one")
	}
	if n := len(workload.SpiffeWorkloadAPI_ServiceDesc.Methods) + len(workload.SpiffeWorkloadAPI_ServiceDesc.Streams); n != 7 {
		t.Errorf("%d methods", n)
	}
}

// TestSpec_D09_UnknownMethod is Unimplemented.
func TestSpec_D09_UnknownMethod(t *testing.T) {
	r := newRig(t, identitytest.NewSource(nil), Options{})
	err := r.conn.Invoke(withHeader(t.Context()), "/SpiffeWorkloadAPI/FetchEverything", &workload.X509SVIDRequest{}, &workload.X509SVIDResponse{})
	if status.Code(err) != codes.Unimplemented {
		t.Error(err)
	}
}
