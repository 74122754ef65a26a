// Package csi puts the agent's workload socket into pods, as a CSI driver of
// ephemeral inline volumes: a pod asks for a volume of the driver, and finds the
// folder with the socket mounted there, read-only. So workloads need no hostPath
// volume, which restricted pods may not have.
//
//	volumes:
//	  - name: meshid
//	    csi: {driver: csi.meshid.io, readOnly: true}
//
// The kubelet finds the driver by a socket in its folder plugins_registry, and calls
// it at another in its folder plugins. What a pod mounts is the folder, not the
// socket, so that an agent that is started again is found in the same place. The
// driver knows nothing of identities: what a pod gets is decided when it connects.
//
// The convention is that of the SPIFFE CSI driver; the interface is CSI 1.
package csi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/attest/peer"
	csiv1 "github.com/meshid/meshid/proto/csi/v1"
	kubeletv1 "github.com/meshid/meshid/proto/kubelet/v1"
)

// Defaults of Config.
const (
	DefaultDriver     = "csi.meshid.io"
	DefaultKubeletDir = "/var/lib/kubelet"
)

// Config of the driver.
type Config struct {
	// Driver is the driver's name, as in the CSIDriver object; DefaultDriver if "".
	Driver string `yaml:"driver"`
	// KubeletDir is the kubelet's folder, at the same path here as for the kubelet;
	// DefaultKubeletDir if "".
	KubeletDir string `yaml:"kubelet_dir"`
	// NodeName is the node's name in Kubernetes.
	NodeName string `yaml:"node_name"`
}

// driverName: a name has at most 63 characters and is a DNS name (CSI,
// GetPluginInfo).
var driverName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$`)

// Sockets are where the kubelet calls the driver, and where it hears of it.
func (c Config) Sockets() (endpoint, registration string) {
	dir, driver := cmp.Or(c.KubeletDir, DefaultKubeletDir), cmp.Or(c.Driver, DefaultDriver)
	return filepath.Join(dir, "plugins", driver, "csi.sock"), filepath.Join(dir, "plugins_registry", driver+"-reg.sock")
}

// Options are what New needs besides the configuration.
type Options struct {
	// SocketDir is the folder of the workload socket. Everything in it can be reached
	// from pods.
	SocketDir string
	Version   string
	// Ready says why the workload socket cannot be used now; nil if it can.
	Ready      func() error
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Driver serves the kubelet.
type Driver struct {
	cfg     Config
	options Options
	volumes *volumes
	calls   *prometheus.CounterVec
}

// New checks the configuration and returns a driver that Run has to be called on.
func New(c Config, o Options) (*Driver, error) {
	if c.Driver == "" {
		c.Driver = DefaultDriver
	}
	if c.KubeletDir == "" {
		c.KubeletDir = DefaultKubeletDir
	}
	switch {
	case !driverName.MatchString(c.Driver):
		return nil, fmt.Errorf("csi: driver %q is not a DNS name of at most 63 characters; write one such as %s", c.Driver, DefaultDriver)
	case !filepath.IsAbs(c.KubeletDir):
		return nil, fmt.Errorf("csi: kubelet_dir %q is relative; write the kubelet's --root-dir", c.KubeletDir)
	case c.NodeName == "":
		return nil, errors.New("csi: node_name is missing; write the node's name in Kubernetes, or set the environment variable NODE_NAME")
	}
	d := &Driver{cfg: c, options: o, volumes: &volumes{
		pods: filepath.Join(c.KubeletDir, "pods"), source: o.SocketDir,
	}}
	d.calls = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_agent_csi_calls_total",
		Help: "Calls of the kubelet to the CSI driver that mount or unmount a volume, by call and outcome.",
	}, []string{"call", "outcome"})
	for _, call := range []string{callPublish, callUnpublish} {
		d.calls.WithLabelValues(call, outcomeOK)
		d.calls.WithLabelValues(call, outcomeError)
	}
	return d, o.Registerer.Register(d.calls)
}

const (
	callPublish   = "publish"
	callUnpublish = "unpublish"
	outcomeOK     = "ok"
	outcomeError  = "error"
)

// shutdownTimeout bounds how long a call of the kubelet may last when Run ends.
const shutdownTimeout = 5 * time.Second

// Run serves the kubelet until ctx ends. Volumes stay mounted: a pod keeps its folder
// while the agent is away.
func (d *Driver) Run(ctx context.Context) error {
	endpoint, registration := d.cfg.Sockets()
	if err := durable.MkdirAll(filepath.Dir(endpoint), 0o700); err != nil {
		return fmt.Errorf("csi: %w", err)
	}
	group, ctx := errgroup.WithContext(ctx)
	serve := func(path string, register func(*grpc.Server)) error {
		l, err := peer.Listen(ctx, path, peer.Options{Mode: 0o600, MaxConns: 16, Logger: d.options.Logger})
		if err != nil {
			return fmt.Errorf("csi: %w", err)
		}
		s := grpc.NewServer(grpc.Creds(peer.Credentials()), grpc.MaxRecvMsgSize(1<<20), grpc.UnaryInterceptor(d.log))
		register(s)
		context.AfterFunc(ctx, func() {
			timer := time.AfterFunc(shutdownTimeout, s.Stop)
			s.GracefulStop()
			timer.Stop()
		})
		group.Go(func() error {
			if err := s.Serve(l); err != nil && ctx.Err() == nil {
				return fmt.Errorf("csi: serve %s: %w", path, err)
			}
			return nil
		})
		return nil
	}
	// The kubelet calls the endpoint as soon as it sees the registration.
	err := serve(endpoint, func(s *grpc.Server) {
		csiv1.RegisterIdentityServer(s, identityService{d: d})
		csiv1.RegisterNodeServer(s, nodeService{d: d})
	})
	if err == nil {
		err = serve(registration, func(s *grpc.Server) {
			kubeletv1.RegisterRegistrationServer(s, registrationService{d: d, endpoint: endpoint})
		})
	}
	if err != nil {
		group.Go(func() error { return err })
	}
	return group.Wait()
}

// log notes calls that failed: the kubelet repeats them, and shows the message in
// the pod's events.
func (d *Driver) log(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	res, err := handler(ctx, req)
	if err != nil {
		d.options.Logger.WarnContext(ctx, "a call of the kubelet failed", "method", info.FullMethod, "err", err)
	}
	return res, err
}

type registrationService struct {
	kubeletv1.UnimplementedRegistrationServer
	d        *Driver
	endpoint string
}

// GetInfo implements kubeletv1.RegistrationServer.
func (s registrationService) GetInfo(context.Context, *kubeletv1.InfoRequest) (*kubeletv1.PluginInfo, error) {
	return &kubeletv1.PluginInfo{Type: "CSIPlugin", Name: s.d.cfg.Driver, Endpoint: s.endpoint, SupportedVersions: []string{"1.0.0"}}, nil
}

// NotifyRegistrationStatus implements kubeletv1.RegistrationServer.
func (s registrationService) NotifyRegistrationStatus(ctx context.Context, r *kubeletv1.RegistrationStatus) (*kubeletv1.RegistrationStatusResponse, error) {
	if r.GetPluginRegistered() {
		s.d.options.Logger.InfoContext(ctx, "the kubelet knows the CSI driver", "driver", s.d.cfg.Driver)
	} else {
		s.d.options.Logger.ErrorContext(ctx, "the kubelet has refused the CSI driver: pods that use it do not start", "driver", s.d.cfg.Driver, "err", r.GetError())
	}
	return &kubeletv1.RegistrationStatusResponse{}, nil
}

type identityService struct {
	csiv1.UnimplementedIdentityServer
	d *Driver
}

// GetPluginInfo implements csiv1.IdentityServer.
func (s identityService) GetPluginInfo(context.Context, *csiv1.GetPluginInfoRequest) (*csiv1.GetPluginInfoResponse, error) {
	return &csiv1.GetPluginInfoResponse{Name: s.d.cfg.Driver, VendorVersion: s.d.options.Version}, nil
}

// GetPluginCapabilities implements csiv1.IdentityServer.
func (identityService) GetPluginCapabilities(context.Context, *csiv1.GetPluginCapabilitiesRequest) (*csiv1.GetPluginCapabilitiesResponse, error) {
	return &csiv1.GetPluginCapabilitiesResponse{}, nil
}

// Probe implements csiv1.IdentityServer.
func (s identityService) Probe(context.Context, *csiv1.ProbeRequest) (*csiv1.ProbeResponse, error) {
	return &csiv1.ProbeResponse{Ready: wrapperspb.Bool(s.d.options.Ready() == nil)}, nil
}

type nodeService struct {
	csiv1.UnimplementedNodeServer
	d *Driver
}

// NodeGetInfo implements csiv1.NodeServer.
func (s nodeService) NodeGetInfo(context.Context, *csiv1.NodeGetInfoRequest) (*csiv1.NodeGetInfoResponse, error) {
	return &csiv1.NodeGetInfoResponse{NodeId: s.d.cfg.NodeName}, nil
}

// NodeGetCapabilities implements csiv1.NodeServer.
func (nodeService) NodeGetCapabilities(context.Context, *csiv1.NodeGetCapabilitiesRequest) (*csiv1.NodeGetCapabilitiesResponse, error) {
	capability := func(t csiv1.NodeServiceCapability_RPC_Type) *csiv1.NodeServiceCapability {
		return &csiv1.NodeServiceCapability{Type: &csiv1.NodeServiceCapability_Rpc{Rpc: &csiv1.NodeServiceCapability_RPC{Type: t}}}
	}
	return &csiv1.NodeGetCapabilitiesResponse{Capabilities: []*csiv1.NodeServiceCapability{
		capability(csiv1.NodeServiceCapability_RPC_GET_VOLUME_STATS), capability(csiv1.NodeServiceCapability_RPC_VOLUME_CONDITION),
	}}, nil
}

// NodePublishVolume implements csiv1.NodeServer. It may be repeated.
func (s nodeService) NodePublishVolume(ctx context.Context, r *csiv1.NodePublishVolumeRequest) (*csiv1.NodePublishVolumeResponse, error) {
	err := s.publish(r)
	s.d.count(callPublish, err)
	if err != nil {
		return nil, err
	}
	s.d.options.Logger.DebugContext(ctx, "volume is mounted", "volume", r.GetVolumeId(), "namespace", r.GetVolumeContext()[podNamespace],
		"pod", r.GetVolumeContext()[podName])
	return &csiv1.NodePublishVolumeResponse{}, nil
}

// What the kubelet says of the pod, if the CSIDriver object has podInfoOnMount.
const (
	ephemeral    = "csi.storage.k8s.io/ephemeral"
	podName      = "csi.storage.k8s.io/pod.name"
	podNamespace = "csi.storage.k8s.io/pod.namespace"
)

func (s nodeService) publish(r *csiv1.NodePublishVolumeRequest) error {
	switch {
	case r.GetVolumeId() == "":
		return status.Error(codes.InvalidArgument, "the volume has no id")
	case r.GetVolumeCapability().GetMount() == nil:
		return status.Error(codes.InvalidArgument, "the volume is a folder with a socket: it can be mounted, and is no block device")
	case r.GetVolumeCapability().GetMount().GetFsType() != "" || len(r.GetVolumeCapability().GetMount().GetMountFlags()) > 0:
		return status.Error(codes.InvalidArgument, "the volume takes no fsType and no mount options: leave them out")
	case !r.GetReadonly():
		return status.Errorf(codes.InvalidArgument, "the volume is read-only: write readOnly: true beside driver: %s", s.d.cfg.Driver)
	case r.GetVolumeContext()[ephemeral] != "true":
		return status.Errorf(codes.InvalidArgument, "the volume must be in the pod itself (csi: {driver: %s, readOnly: true}); "+
			"the CSIDriver object must have volumeLifecycleModes: [Ephemeral] and podInfoOnMount: true", s.d.cfg.Driver)
	}
	if err := s.d.options.Ready(); err != nil {
		return status.Errorf(codes.Unavailable, "the agent's workload socket is not there yet: %v", err)
	}
	return asStatus(s.d.volumes.publish(r.GetTargetPath()))
}

// NodeUnpublishVolume implements csiv1.NodeServer. It may be repeated.
func (s nodeService) NodeUnpublishVolume(_ context.Context, r *csiv1.NodeUnpublishVolumeRequest) (*csiv1.NodeUnpublishVolumeResponse, error) {
	err := status.Error(codes.InvalidArgument, "the volume has no id")
	if r.GetVolumeId() != "" {
		err = asStatus(s.d.volumes.unpublish(r.GetTargetPath()))
	}
	s.d.count(callUnpublish, err)
	if err != nil {
		return nil, err
	}
	return &csiv1.NodeUnpublishVolumeResponse{}, nil
}

// NodeGetVolumeStats implements csiv1.NodeServer: it says whether the pod still sees
// the socket.
func (s nodeService) NodeGetVolumeStats(_ context.Context, r *csiv1.NodeGetVolumeStatsRequest) (*csiv1.NodeGetVolumeStatsResponse, error) {
	if r.GetVolumeId() == "" {
		return nil, status.Error(codes.InvalidArgument, "the volume has no id")
	}
	condition := &csiv1.VolumeCondition{Message: "the folder of the workload socket is mounted"}
	state, err := s.d.volumes.state(r.GetVolumePath())
	switch {
	case err != nil:
		return nil, asStatus(err)
	case state == absent:
		return nil, status.Error(codes.NotFound, "nothing is mounted there")
	case state == stale:
		condition.Abnormal, condition.Message = true, "the folder of the workload socket was made anew: the pod sees the old one, and must be started again"
	default:
	}
	return &csiv1.NodeGetVolumeStatsResponse{
		Usage:           []*csiv1.VolumeUsage{{Unit: csiv1.VolumeUsage_BYTES}},
		VolumeCondition: condition,
	}, nil
}

func (d *Driver) count(call string, err error) {
	outcome := outcomeOK
	if err != nil {
		outcome = outcomeError
	}
	d.calls.WithLabelValues(call, outcome).Inc()
}

func asStatus(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errTarget):
		return status.Error(codes.InvalidArgument, err.Error())
	default:
		return status.Error(codes.Internal, err.Error())
	}
}
