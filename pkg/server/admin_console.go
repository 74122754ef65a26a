package server

import (
	"context"

	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

type consoleService struct {
	adminv1.UnimplementedConsoleServiceServer
	s *Server
}

// CreateLink implements adminv1.ConsoleServiceServer.
func (l *consoleService) CreateLink(ctx context.Context, _ *adminv1.CreateLinkRequest) (*adminv1.CreateLinkResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if l.s.cfg.ConsoleLink == nil {
		return nil, fail(kindConflict, "this CA has no console", nil)
	}
	address, ends, err := l.s.cfg.ConsoleLink(c.actor)
	if err != nil {
		return nil, fail(kindConflict, err.Error(), nil)
	}
	l.s.log.InfoContext(ctx, "link to the console made", "actor", c.actor, "request_id", c.requestID)
	return &adminv1.CreateLinkResponse{Url: address, ExpiresAt: timestamppb.New(ends)}, nil
}
