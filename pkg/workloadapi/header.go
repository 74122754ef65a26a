package workloadapi

import (
	"context"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// securityHeader must be "true" on every call: Workload Endpoint §3.
const securityHeader = "workload.spiffe.io"

// exempt are the services on the same socket whose clients are proxies that do not
// send the header.
var exempt = []string{
	"/envoy.service.secret.v3.SecretDiscoveryService/",
	"/envoy.service.discovery.v3.AggregatedDiscoveryService/",
}

// ServerOptions are the gRPC options that Register and RegisterReflection need:
// they demand the header that the standard demands. They go together with those
// of package sds.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := checkHeader(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := checkHeader(stream.Context(), info.FullMethod); err != nil {
				return err
			}
			return next(srv, stream)
		}),
	}
}

// checkHeader refuses a call without the header, which must be there once and be
// exactly "true".
func checkHeader(ctx context.Context, method string) error {
	for _, prefix := range exempt {
		if strings.HasPrefix(method, prefix) {
			return nil
		}
	}
	if values := metadata.ValueFromIncomingContext(ctx, securityHeader); len(values) != 1 || values[0] != "true" {
		// Workload Endpoint §6.
		return status.Errorf(codes.InvalidArgument, "the metadata %s: true is missing", securityHeader)
	}
	return nil
}
